"""The open sessions of a gateway, and the keys that lead to them.

A session has two keys. Its API key is the agent's: it may ask for completions.
Its control key is the scorer's: it may post rewards and close the session, so
that an agent cannot reward itself.

Invariants:
  1. A key leads to one open session; keys are kept and looked up by digest.
  2. Closing takes the keys away first, then aborts what is in flight and waits
     for it.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import hmac
import re
import secrets

from forge_jax.engine import api
from forge_jax.gateway import refusal, sessions

_NO_DIGEST = bytes(hashlib.sha256().digest_size)  # no key has it


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
  """A session that was opened, and its keys."""

  session: sessions.Session
  api_key: str = dataclasses.field(repr=False)
  control_key: str = dataclasses.field(repr=False)


class SessionTable:
  """Holds the open sessions."""

  def __init__(self, engine: api.Engine):
    """An empty table; `engine` runs the sessions' requests."""
    self._engine = engine
    self.draining = False  # whether no further sessions are opened
    self._sessions: dict[str, sessions.Session] = {}
    self._by_api_key: dict[bytes, sessions.Session] = {}
    self._keys: dict[str, tuple[bytes, bytes]] = {}  # by session: API, control

  def __len__(self) -> int:
    return len(self._sessions)

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
      raise refusal.Refusal(f"session {id!r} is open already", status=409)
    session = sessions.Session(id, seed, sampling)
    name = re.sub(r"[^A-Za-z0-9_.]", "_", id)
    opened = Opened(
      session,
      api_key=f"forge-{name}-{secrets.token_urlsafe(24)}",
      control_key=f"forge-control-{name}-{secrets.token_urlsafe(24)}",
    )
    digest = key_digest(opened.api_key)
    self._sessions[id] = session
    self._keys[id] = digest, key_digest(opened.control_key)
    self._by_api_key[digest] = session
    return opened

  def by_key(self, api_key: str) -> sessions.Session:
    """The session that an API key leads to.

    Raises:
      Refusal: there is none.
    """
    session = self._by_api_key.get(key_digest(api_key))
    if session is None:
      raise refusal.unauthorised("the API key belongs to no open session")
    return session

  def by_id(self, id: str) -> sessions.Session:
    """The open session of a name.

    Raises:
      Refusal: there is none.
    """
    if id not in self._sessions:
      raise refusal.Refusal(f"no session {id!r} is open", status=404)
    return self._sessions[id]

  def controls(self, control_key: str, id: str) -> bool:
    """Whether a key is the control key of the open session of a name."""
    _, digest = self._keys.get(id, (_NO_DIGEST, _NO_DIGEST))
    return hmac.compare_digest(key_digest(control_key), digest)

  async def close(self, session: sessions.Session) -> None:
    """Takes a session's keys away, aborts what it runs and waits for it."""
    session.closed = True
    del self._sessions[session.id]
    del self._by_api_key[self._keys.pop(session.id)[0]]
    for request_id in session.running:
      self._engine.abort(request_id)
    await session.drain()

  async def close_all(self) -> None:
    """Closes every session."""
    for session in list(self._sessions.values()):
      await self.close(session)


def key_digest(key: str) -> bytes:
  """What is kept of a key."""
  return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
