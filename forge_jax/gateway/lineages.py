"""Where a request belongs: the conversations that a session has seen.

Invariants:
  1. A place is a conversation, kept as the digest of its messages one after
     another, together with the assistant's turns that have followed it: replies
     that were delivered, and turns that came in a request. A message may lead
     to several places, one for each turn that it may be (see `turns`); any
     other leads to one.
  2. What a request's message says, if it is a turn that is known, is what was
     shown to the model before, not how it is written this time.
  3. A search reads each message once, whatever the number of completions.
  4. What is kept of a message is a digest, but for the assistant's turns, which
     are kept whole, once each.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
from typing import Any

import msgpack

from forge_jax import types
from forge_jax.gateway import turns

# Why a request that replays something recorded does not extend it.
REPLY_CHANGED = "reply"  # the turn that answers a recorded request differs
REPLY_OMITTED = "omitted"  # another message stands where a reply was given
HISTORY_CHANGED = "history"  # a recorded reply follows other messages
TOOLS_CHANGED = "tools"  # the same conversation, other tools or effort


# A conversation: the digest of its messages, 16 bytes.
Place = bytes
_NOWHERE: Place = bytes(16)  # no message yet


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Known:
  """An assistant's turn that has followed a conversation."""

  said: bytes  # the message, in MessagePack
  behind: Place  # the conversation with it
  node: Any | None = None  # a forest.Node, if it is a delivered reply
  tools: bytes = b""  # digest of the tools of the request that it answers

  def message(self) -> types.Message:
    """The turn as it was shown to the model."""
    return msgpack.unpackb(self.said)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Path:
  """A way to read a conversation, from its last message back."""

  place: Place
  known: tuple[tuple[int, Known], ...] = ()  # what the message may be, likeness
  before: "Path | None" = None

  def replies(self, tools: bytes | None = None) -> list[tuple[int, Known]]:
    """What is a delivered reply; with `tools`, to a request with these."""
    return [
      (like, known)
      for like, known in self.known
      if known.node and tools in (None, known.tools)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
  """Where a request belongs."""

  parent: Any | None  # the forest.Node that it extends
  depth: int  # how many messages that covers
  reason: str | None  # why it does not cover more
  messages: list[types.Message]  # with the turns it covers as they were shown
  place: Place  # the known beginning of the conversation
  rest: types.Messages  # the messages beyond it


class Lineages:
  """Finds the completion that a conversation goes on from."""

  def __init__(self):
    """Begins empty."""
    # Places reached so far but those behind a turn, and what has followed.
    self._turns: dict[Place, tuple[Known, ...]] = {_NOWHERE: ()}
    self._said: set[bytes] = set()  # loose digests of all replies
    self._tools: dict[bytes, bytes] = {}  # each digest of tools, once

  def find(self, messages: types.Messages, tools: bytes) -> Match:
    """Where a request belongs.

    Args:
      messages: the request's; at least one.
      tools: digest of its tools, and of what else a prompt depends on.
    """
    ways = [[Path(_NOWHERE)]]  # ways[n] lead behind the first n messages
    for message in messages:
      paths = self._step(ways[-1], message)
      if not paths:
        break
      ways.append(paths)
    depth, path, node = _deepest(ways, tools)
    return Match(
      parent=node,
      depth=depth,
      reason=self._reason(messages, ways, depth),
      messages=_as_shown(messages, depth, path),
      place=ways[-1][0].place,
      rest=messages[len(ways) - 1 :],
    )

  def add(
    self, match: Match, tools: bytes, message: types.Message, node: Any
  ) -> None:
    """Remembers the reply that a request's client was sent.

    Args:
      match: what `find` said of the request.
      tools: as `find` was given them.
      message: the reply.
      node: the recorded completion, a forest.Node.
    """
    place = match.place
    for one in match.rest:
      place = self._after(place, one)
    turn = turns.read(message)
    behind = _behind(place, turn.digest())
    tools = self._tools.setdefault(tools, tools)
    self._follow(place, Known(msgpack.packb(message), behind, node, tools))
    self._said.add(turn.loose_digest())

  def _after(self, place: Place, message: types.Message) -> Place:
    """The place behind a message; remembers it."""
    behind = _behind(place, _digest(message))
    if message["role"] != "assistant":
      self._turns.setdefault(behind, ())
    elif not any(k.behind == behind for k in self._turns.get(place, ())):
      self._follow(place, Known(msgpack.packb(message), behind))
    return behind

  def _follow(self, place: Place, known: Known) -> None:
    self._turns[place] = (*self._turns.get(place, ()), known)

  def _answered(self, place: Place) -> bool:
    """Whether a reply to a conversation was delivered."""
    return any(known.node for known in self._turns.get(place, ()))

  def _step(self, paths: Sequence[Path], message: types.Message) -> list[Path]:
    """The ways to go on with a message; what it resembles most comes first."""
    if message["role"] != "assistant":
      digest = _digest(message)
      behind = [(_behind(path.place, digest), path) for path in paths]
      return [
        Path(place, before=path)
        for place, path in behind
        if place in self._turns
      ]
    sent = turns.read(message)
    found = []
    for path in paths:
      by_place: dict[Place, list[tuple[int, Known]]] = {}
      for known in self._turns.get(path.place, ()):
        if like := turns.likeness(sent, turns.read(known.message())):
          by_place.setdefault(known.behind, []).append((like, known))
      found += [
        Path(place, tuple(known), path) for place, known in by_place.items()
      ]
    found.sort(
      key=lambda path: max(like for like, _ in path.known), reverse=True
    )
    return found

  def _reason(
    self,
    messages: types.Messages,
    ways: Sequence[Sequence[Path]],
    depth: int,
  ) -> str | None:
    """Why messages beyond `depth`, if they replay something, do not extend."""
    if any(path.replies() for paths in ways[depth + 1 :] for path in paths):
      return TOOLS_CHANGED
    for n in range(depth, len(messages)):
      before = ways[n] if n < len(ways) else ()
      answered = any(self._answered(path.place) for path in before)
      if messages[n]["role"] != "assistant":
        if answered:
          return REPLY_OMITTED
      elif answered:
        return REPLY_CHANGED
      elif turns.read(messages[n]).loose_digest() in self._said:
        return HISTORY_CHANGED
    return None


def tools_digest(tools: types.Messages, effort: str | None) -> bytes:
  """A digest of tools, in any order, and of the effort of reasoning."""
  texts = sorted(json.dumps(tool, sort_keys=True) for tool in tools)
  return turns.digest_of(effort or "", *texts)


def _deepest(
  ways: Sequence[Sequence[Path]], tools: bytes
) -> tuple[int, Path | None, Any | None]:
  """The deepest reply to requests with these tools: how far, how, its node."""
  for depth in range(len(ways) - 1, 0, -1):
    found = [
      (like, known.node.number, path, known.node)
      for path in ways[depth]
      for like, known in path.replies(tools)
    ]
    if found:
      *_, path, node = max(found, key=lambda item: item[:2])
      return depth, path, node
  return 0, None, None


def _as_shown(
  messages: types.Messages, depth: int, path: Path | None
) -> list[types.Message]:
  """The messages, with the turns on a path as the model has seen them."""
  shown = list(messages)
  for n in range(depth - 1, -1, -1):
    if path.known:
      _, known = max(path.known, key=lambda item: item[0])
      shown[n] = known.message()
    path = path.before
  return shown


def _behind(place: Place, digest: bytes) -> Place:
  return hashlib.blake2b(place + digest, digest_size=16).digest()


def _digest(message: types.Message) -> bytes:
  """A digest of what a message shows to a model."""
  if message["role"] == "assistant":
    return turns.read(message).digest()
  name = "" if message["role"] == "tool" else message.get("name", "")
  return turns.digest_of(message["role"], name, message["content"] or "")
