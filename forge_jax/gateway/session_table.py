"""The open sessions of a gateway, and the keys that lead to them.

A session has two keys. Its API key is the agent's: it may ask for completions.
Its control key is the scorer's: it may post rewards and close the session, so
that an agent cannot reward itself.

Invariants:
  1. A key leads to one open session; keys are kept and looked up by digest.
  2. Closing takes the API key away first, then aborts what is in flight and
     waits for it. A closed session is held for a while, in which it may be
     closed again by a client that the answer did not reach, or be replaced.
     One that nobody asks anything of any more may be closed by `close_idle`.
  3. What is needed to open the sessions again is in the journal: of the keys
     their digests.
"""

import asyncio
from collections.abc import Iterable, Mapping
import dataclasses
import functools
import hashlib
import hmac
import logging
import re
import secrets
import time

from forge_jax.engine import api
from forge_jax.gateway import journal, records, refusal, replay, sessions

_log = logging.getLogger(__name__)

_HOLD_SECONDS = 10.0  # between closing a session and forgetting it
_NO_DIGEST = bytes(hashlib.sha256().digest_size)  # no key has it


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
  """A session that was opened, and its keys."""

  session: sessions.Session
  api_key: str = dataclasses.field(repr=False)
  control_key: str = dataclasses.field(repr=False)


class SessionTable:
  """Holds the sessions, open and just closed."""

  def __init__(self, engine: api.Engine, log: journal.Log):
    """An empty table; `engine` runs the sessions' requests."""
    self._engine = engine
    self.draining = False  # whether no further sessions are opened
    self._journal = log
    self._sessions: dict[str, sessions.Session] = {}
    self._by_api_key: dict[bytes, sessions.Session] = {}
    self._keys: dict[str, tuple[bytes, bytes]] = {}  # by session: API, control
    self._asked: dict[str, float] = {}  # when something was, by session

  def __len__(self) -> int:
    return len(self._by_api_key)  # the open ones

  def open(self, id: str, seed: int, sampling: Mapping[str, float]) -> Opened:
    """A new session and its keys.

    Raises:
      Refusal: a session of that name is open, or the gateway is draining.
    """
    if self.draining:
      raise refusal.Refusal(
        "the gateway is shutting down: no session is opened any more",
        status=503,
        code="shutting_down",
      )
    if id in self._sessions:
      if not self._sessions[id].closed:
        raise refusal.Refusal(f"session {id!r} is open already", status=409)
      self._forget(self._sessions[id])
    name = re.sub(r"[^A-Za-z0-9_.]", "_", id)
    api_key = f"forge-{name}-{secrets.token_urlsafe(24)}"
    control_key = f"forge-control-{name}-{secrets.token_urlsafe(24)}"
    session = sessions.Session(id, seed, sampling)
    keys = key_digest(api_key), key_digest(control_key)
    self._journal.append(id, records.opening(id, seed, sampling, keys))
    self._add(session, keys)
    return Opened(session, api_key, control_key)

  def restore(self, left: Iterable[tuple[str, journal.Record]]) -> None:
    """Opens the sessions that a journal's records tell of."""
    replays: dict[str, replay.Replay] = {}
    for id, record in left:
      if not record:
        replays.pop(id, None)
      elif record["kind"] == "opening":
        replays[id] = replay.Replay(record)
      elif id in replays:  # else a segment is gone that began a closed session
        replays[id].apply(record)
    for back in replays.values():
      self._add(back.session, back.keys)

  def by_key(self, api_key: str) -> sessions.Session:
    """The session that an API key leads to.

    Raises:
      Refusal: there is none.
    """
    session = self._by_api_key.get(key_digest(api_key))
    if session is None:
      raise refusal.unauthorised("the API key belongs to no open session")
    self._asked[session.id] = time.monotonic()
    return session

  def by_id(self, id: str) -> sessions.Session:
    """The session of a name.

    Raises:
      Refusal: there is none.
    """
    if id not in self._sessions:
      raise refusal.Refusal(f"no session {id!r} is open", status=404)
    self._asked[id] = time.monotonic()
    return self._sessions[id]

  def controls(self, control_key: str, id: str) -> bool:
    """Whether a key is the control key of the open session of a name."""
    _, digest = self._keys.get(id, (_NO_DIGEST, _NO_DIGEST))
    return hmac.compare_digest(key_digest(control_key), digest)

  async def close(self, session: sessions.Session) -> None:
    """Takes a session's API key away, aborts what it runs, waits for it."""
    if not session.closed:
      session.close()
      self._hold(session)
    await self._abort(session)

  async def close_idle(self, seconds: float) -> None:
    """Closes sessions that were asked for nothing for so long, and run nothing.

    Whoever opened them must have died. What they hold is dropped.
    """
    now = time.monotonic()
    for session in list(self._by_api_key.values()):
      if session.running:
        self._asked[session.id] = now
      elif now - self._asked[session.id] >= seconds:
        summary = session.summary()
        _log.warning(
          "session %r is closed, with %d completions and %d rewards: nothing was "
          "asked of it for %.0f seconds",
          session.id,
          summary["completions"],
          summary["rewards"],
          seconds,
        )
        await self.close(session)

  async def abort_all(self) -> None:
    """Aborts what is in flight in all sessions, and waits for it."""
    for session in list(self._sessions.values()):
      session.closed = True
      await self._abort(session)

  async def _abort(self, session: sessions.Session) -> None:
    for request_id in session.running:
      self._engine.abort(request_id)
    await session.drain()

  def _add(self, session: sessions.Session, keys: tuple[bytes, bytes]) -> None:
    session.log = functools.partial(self._journal.append, session.id)
    self._sessions[session.id] = session
    self._keys[session.id] = keys
    self._asked[session.id] = time.monotonic()
    self._by_api_key[keys[0]] = session
    if session.closed:
      self._hold(session)

  def _hold(self, session: sessions.Session) -> None:
    """Keeps a session that is closed, for a while."""
    self._by_api_key.pop(self._keys[session.id][0], None)
    loop = asyncio.get_running_loop()
    loop.call_later(_HOLD_SECONDS, self._forget, session)

  def _forget(self, session: sessions.Session) -> None:
    if self._sessions.get(session.id) is session:
      for table in (self._sessions, self._keys, self._asked):
        del table[session.id]
      self._journal.forget(session.id)


def key_digest(key: str) -> bytes:
  """What is kept of a key."""
  return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
