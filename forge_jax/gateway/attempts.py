"""Requests as they come in, and those that are asked again.

A client that has not got its reply asks again, with the same bytes. Invariants:
  1. A request is tied to an earlier one with the same bytes if that one's reply
     was lost: the client went away, or was sent a failure; or if the request
     says itself that it is a retry.
  2. A request is tied to one at most, and no two to the same. Identical
     requests whose replies arrived have nothing to do with each other.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import sys
import time

from forge_jax import types

SUB_AGENT = "x-forge-sub-agent"  # header that names a white-box sub-agent
# Headers that name a client's session, its thread or its agent.
ID_HEADERS = (
  "x-session-id",
  "x-claude-code-session-id",
  "x-claude-code-agent-id",
  "x-claude-code-parent-agent-id",
  "session-id",  # Codex
  "session_id",
  "thread-id",
  "thread_id",
  "conversation_id",
  "x-openai-subagent",
  SUB_AGENT,
  "x-opencode-session",
  "x-session-affinity",
)
_LONGEST_ID = 256  # characters that are kept
_NO_IDS: Mapping[str, str] = {}  # of the many requests that bear none


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
  """What a request says of itself, beside what it asks for."""

  protocol: str  # its route under the base URL
  model: str
  digest: str  # of its bytes
  client_ids: Mapping[str, str]
  retries: int  # how often it was sent before, as the client says
  arrived: float  # time.monotonic()


def read(
  protocol: str, model: str, body: bytes, headers: Mapping[str, str]
) -> Caller:
  """Reads what a request says of itself; `headers` ignore case."""
  retries = headers.get("x-stainless-retry-count", "")
  return Caller(
    protocol=protocol,
    model=sys.intern(model),  # every request of an agent names the same
    digest=hashlib.blake2b(body, digest_size=16).hexdigest(),
    client_ids={
      name: headers[name][:_LONGEST_ID]
      for name in ID_HEADERS
      if name in headers
    }
    or _NO_IDS,
    retries=int(retries) if retries.isdecimal() and len(retries) < 9 else 0,
    arrived=time.monotonic(),
  )


class Attempt:
  """A request being served, or one that was and may be asked again."""

  __slots__ = ("caller", "completions", "lost", "original", "over")

  def __init__(self, caller: Caller, original: "Attempt | None" = None):
    """`original` is the attempt that it repeats."""
    self.caller = caller
    self.original = original
    # Names of what was recorded so far, by choice.
    self.completions: tuple[str | None, ...] = ()
    self.lost = False  # its reply did not arrive
    self.over = False

  def request(self, kind: types.RequestKind, opened: float) -> types.Request:
    """What it says of itself; `opened` is the session's time.monotonic()."""
    return types.Request(
      protocol=self.caller.protocol,
      model=self.caller.model,
      digest=self.caller.digest,
      kind=kind,
      client_ids=self.caller.client_ids,
      arrived=self.caller.arrived - opened,
    )

  def repeats(self, choice: int) -> str | None:
    """The recorded completion that a choice repeats; None: there is none."""
    original = self.original
    while original is not None:
      if name := dict(enumerate(original.completions)).get(choice):
        return name
      original = original.original
    return None

  def record(self, choice: int, name: str) -> None:
    """Remembers the completion of a choice."""
    names = dict(enumerate(self.completions)) | {choice: name}
    self.completions = tuple(names.get(n) for n in range(max(names) + 1))


class Attempts:
  """The requests of one session."""

  def __init__(self):
    """Begins empty."""
    self._untied: dict[str, tuple[Attempt, ...]] = {}  # by digest, in order
    self.lost: set[str] = set()  # completions that did not arrive

  def begin(self, caller: Caller) -> Attempt:
    """A request that has come in; `end` ends it."""
    earlier = self._untied.get(caller.digest, ())
    known = [a for a in earlier if a.lost] or (
      earlier if caller.retries else ()
    )
    original = known[-1] if known else None
    attempt = Attempt(caller, original)
    others = (a for a in earlier if a is not original)
    self._untied[caller.digest] = (*others, attempt)
    return attempt

  def end(self, attempt: Attempt, delivered: bool) -> None:
    """Tells whether the client was sent the whole reply."""
    attempt.over, attempt.lost = True, not delivered
    if attempt.lost:
      self.lost.update(filter(None, attempt.completions))
      return
    # Of those whose replies arrived the latest is all that may be asked again.
    digest = attempt.caller.digest
    self._untied[digest] = tuple(
      a for a in self._untied[digest] if a.lost or not a.over or a is attempt
    )
