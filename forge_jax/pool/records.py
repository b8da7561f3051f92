"""What the pool's records are: groups, claims and notes, and their heads.

A head is the JSON that is wanted without reading the body: everything about a
claim and a note, and of a group what a scheduler, a filter or a person asks
before the tokens.
"""

from collections.abc import Mapping
import dataclasses
import json
import time
from typing import Any

from forge_jax import errors, types
from forge_jax.pool import codec, segment

GROUP, CLAIM, NOTE = 1, 2, 3
NAMES = {GROUP: "group", CLAIM: "the claim of step", NOTE: "note"}


@dataclasses.dataclass(frozen=True, slots=True)
class GroupInfo:
  """What is known of a stored group without its tokens."""

  index: int
  number: int  # the task's place in the run
  attempt: int  # earlier groups of the task that were dropped
  task: str  # the task's id
  domain: str
  episodes: int
  completed: int  # episodes that ended as COMPLETED
  completions: int
  request_tokens: int  # prompts and responses, each request's own
  response_tokens: int
  version: int | None  # the oldest weights that sampled a token; None: none did
  perf: float  # mean over the episodes of their perf rewards
  seconds: float  # of the longest episode
  stored: float  # seconds since 1970, by the clock of the host that stored it
  bytes: int  # of the record


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
  """What the optimizer step number `step` consumes. Written by the queue."""

  step: int  # from 1
  trained: tuple[int, ...]  # indices of groups, in the order of the batch
  dropped: tuple[int, ...] = ()  # consumed on the way to it, for good
  again: tuple[int, ...] = ()  # likewise, and their tasks submitted again

  @property
  def consumed(self) -> tuple[int, ...]:
    """All indices that the step consumes."""
    return self.trained + self.dropped + self.again


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
  """Something said about a stored group after the fact."""

  number: int  # in the order of writing
  group: int
  record: Mapping[str, Any]  # JSON values; their meaning is the writer's


def group_record(group: types.Group) -> segment.Record:
  """The record of a group.

  Raises:
    PoolError: the group is not well-formed.
  """
  completions = [c for e in group.episodes for c in e.completions]
  prompts = sum(len(c.prompt_ids) for c in completions)
  responses = sum(len(c.response_ids) for c in completions)
  body = codec.encode(group)
  episodes = group.episodes
  head = {
    "index": group.index,
    "number": group.index if group.number is None else group.number,
    "attempt": group.attempt,
    "task": group.task.id,
    "domain": group.task.domain,
    "episodes": len(episodes),
    "completed": sum(
      e.status == types.EpisodeStatus.COMPLETED for e in episodes
    ),
    "completions": len(completions),
    "request_tokens": prompts + responses,
    "response_tokens": responses,
    "version": group.version,
    "perf": sum(e.perf for e in episodes) / max(1, len(episodes)),
    "seconds": max((e.seconds for e in episodes), default=0.0),
    "stored": time.time(),
  }
  return segment.Record(GROUP, group.index, _json(head), body)


def group_info(head: str, length: int) -> GroupInfo:
  """Reads a group's head; `length` is the record's, bytes."""
  return GroupInfo(**json.loads(head), bytes=length)


def claim_record(claim: Claim) -> segment.Record:
  """The record of a claim."""
  return segment.Record(CLAIM, claim.step, _json(dataclasses.asdict(claim)))


def read_claim(head: str) -> Claim:
  """The inverse of `claim_record`."""
  record = json.loads(head)
  return Claim(
    record["step"],
    *(tuple(record[name]) for name in ("trained", "dropped", "again")),
  )


def note_record(note: Note) -> segment.Record:
  """The record of a note.

  Raises:
    PoolError: it does not fit into JSON.
  """
  try:
    head = _json({"group": note.group, "record": dict(note.record)})
  except (TypeError, ValueError) as error:
    raise errors.PoolError(
      f"a note on group {note.group} does not fit into JSON: {error}"
    ) from error
  return segment.Record(NOTE, note.number, head)


def read_note(number: int, head: str) -> Note:
  """The inverse of `note_record`."""
  record = json.loads(head)
  return Note(number, record["group"], record["record"])


def _json(value: Any) -> bytes:
  return json.dumps(value, separators=(",", ":")).encode()
