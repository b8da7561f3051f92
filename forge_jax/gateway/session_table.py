"""The open sessions of a gateway, and the keys that lead to them.

Invariants:
  1. A key leads to one open session; keys are kept and looked up by digest.
  2. Closing takes the key away first, then aborts what is in flight and waits
     for it.
"""

from collections.abc import Mapping
import hashlib
import re
import secrets

from forge_jax.engine import api
from forge_jax.gateway import refusal, sessions


class SessionTable:
  """Holds the open sessions."""

  def __init__(self, engine: api.Engine):
    """An empty table; `engine` runs the sessions' requests."""
    self._engine = engine
    self._sessions: dict[str, sessions.Session] = {}
    self._keys: dict[bytes, sessions.Session] = {}
    self._key_of: dict[str, bytes] = {}

  def open(
    self, id: str, seed: int, sampling: Mapping[str, float]
  ) -> tuple[sessions.Session, str]:
    """A new session and its API key.

    Raises:
      Refusal: a session of that name is open.
    """
    if id in self._sessions:
      raise refusal.Refusal(f"session {id!r} is open already", status=409)
    session = sessions.Session(id, seed, sampling)
    name = re.sub(r"[^A-Za-z0-9_.]", "_", id)
    api_key = f"forge-{name}-{secrets.token_urlsafe(24)}"
    self._sessions[id] = session
    self._key_of[id] = key_digest(api_key)
    self._keys[self._key_of[id]] = session
    return session, api_key

  def by_key(self, key: str) -> sessions.Session:
    """The session that a key leads to.

    Raises:
      Refusal: there is none.
    """
    session = self._keys.get(key_digest(key))
    if session is None:
      raise refusal.Refusal(
        "the API key belongs to no open session",
        status=401,
        code="invalid_api_key",
      )
    return session

  def by_id(self, id: str) -> sessions.Session:
    """The open session of a name.

    Raises:
      Refusal: there is none.
    """
    if id not in self._sessions:
      raise refusal.Refusal(f"no session {id!r} is open", status=404)
    return self._sessions[id]

  async def close(self, session: sessions.Session) -> None:
    """Takes a session's key away, aborts what it runs and waits for it."""
    session.closed = True
    del self._sessions[session.id]
    del self._keys[self._key_of.pop(session.id)]
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
