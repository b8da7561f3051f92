"""Where a request belongs: the conversations that a session has seen.

Invariants:
  1. A place is a conversation, message by message. It knows the assistant's
     turns that have followed it: replies that were delivered, and turns that
     came in a request. A message may lead to several places, one for each turn
     that it may be (see `turns`); any other leads to one.
  2. What a request's message says, if it is a turn that is known, is what was
     shown to the model before, not how it is written this time.
  3. A search reads each message once, whatever the number of completions.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from forge_jax import types
from forge_jax.gateway import turns

# Why a request that replays something recorded does not extend it.
REPLY_CHANGED = "reply"  # the turn that answers a recorded request differs
REPLY_OMITTED = "omitted"  # another message stands where a reply was given
HISTORY_CHANGED = "history"  # a recorded reply follows other messages
TOOLS_CHANGED = "tools"  # the same conversation, other tools or effort


class Place:
  """A conversation; knows what has followed it."""

  __slots__ = ("next", "turns")

  def __init__(self):
    """A conversation that nothing has followed."""
    self.next: dict[bytes, Place] = {}
    self.turns: list[Known] = []

  def after(self, message: types.Message) -> "Place":
    """The place behind a message; makes it if there is none."""
    digest = _digest(message)
    if digest not in self.next:
      self.next[digest] = Place()
      if message["role"] == "assistant":
        turn = turns.read(message)
        self.turns.append(Known(message, turn, self.next[digest]))
    return self.next[digest]

  @property
  def answered(self) -> bool:
    """Whether a reply to the conversation was delivered."""
    return any(known.node for known in self.turns)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Known:
  """An assistant's turn that has followed a conversation."""

  message: types.Message
  turn: turns.Turn
  behind: Place  # the conversation with it
  node: Any | None = None  # a forest.Node, if it is a delivered reply
  tools: bytes = b""  # digest of the tools of the request that it answers


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
    self._root = Place()
    self._said: set[bytes] = set()  # loose digests of all replies

  def find(self, messages: types.Messages, tools: bytes) -> Match:
    """Where a request belongs.

    Args:
      messages: the request's; at least one.
      tools: digest of its tools, and of what else a prompt depends on.
    """
    ways = [[Path(self._root)]]  # ways[n] lead behind the first n messages
    for message in messages:
      paths = _step(ways[-1], message)
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
      place = place.after(one)
    turn = turns.read(message)
    behind = place.next.setdefault(turn.digest(), Place())
    place.turns.append(Known(message, turn, behind, node, tools))
    self._said.add(turn.loose_digest())

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
      answered = any(path.place.answered for path in before)
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


def _step(paths: Sequence[Path], message: types.Message) -> list[Path]:
  """The ways to go on with a message; what it resembles most comes first."""
  if message["role"] != "assistant":
    digest = _digest(message)
    return [
      Path(path.place.next[digest], before=path)
      for path in paths
      if digest in path.place.next
    ]
  sent = turns.read(message)
  found = []
  for path in paths:
    by_place: dict[Place, list[tuple[int, Known]]] = {}
    for known in path.place.turns:
      if like := turns.likeness(sent, known.turn):
        by_place.setdefault(known.behind, []).append((like, known))
    found += [
      Path(place, tuple(known), path) for place, known in by_place.items()
    ]
  found.sort(key=lambda path: max(like for like, _ in path.known), reverse=True)
  return found


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
      shown[n] = known.message
    path = path.before
  return shown


def _digest(message: types.Message) -> bytes:
  """A digest of what a message shows to a model."""
  if message["role"] == "assistant":
    return turns.read(message).digest()
  name = "" if message["role"] == "tool" else message.get("name", "")
  return turns.digest_of(message["role"], name, message["content"] or "")
