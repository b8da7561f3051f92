"""A group as bytes and back, exactly; a shared prefix is stored once.

A group becomes one safetensors file in memory with four tensors:

  tokens    int32    the group's prefix forest (below)
  logprobs  float32  of all completions, end to end in the order of episodes
  versions  int32    likewise
  record    uint8: everything else, as UTF-8 JSON

The forest: a sequence is a completion's prompt and response. One that its
child's prompt extends lies within the child's (`record["within"]`, -1: none
does). The others are sorted, so that those with a common prefix are
neighbours, and each adds only what it does not share with the one before it:
`record["order"]` is the sorted order, `record["shared"]` how many tokens each
shares. Every distinct token of the forest is thus stored exactly once.

A carrier's other fields become JSON by their declared types: a field with a
default may be added to `types.Completion` without a change here, and records
without it still read. Python's JSON writes a float with the digits that read
back as the same float, so that nothing is rounded on the way.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import enum
import functools
import json
import struct
import types as python_types
import typing
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from forge_jax import errors, types

CODEC_VERSION = 3

_DTYPES = {
  "prompt_ids": np.dtype(np.int32),
  "response_ids": np.dtype(np.int32),
  "logprobs": np.dtype(np.float32),
  "versions": np.dtype(np.int32),
}
_SAFETENSORS = {np.int32: "I32", np.float32: "F32", np.uint8: "U8"}
_SCALARS = frozenset((str, int, float, bool, type(None)))
_EPISODES, _TASK = frozenset(("episodes",)), frozenset(("task",))


def encode(group: types.Group) -> memoryview:
  """Returns the group's bytes.

  They are laid out in place: a copy of a long episode takes longer than all
  else that is done here.

  Raises:
    PoolError: an array has another dtype or length than `types.Completion`
      promises, or a field that must be JSON is not.
  """
  completions = [c for e in group.episodes for c in e.completions]
  for completion in completions:
    _check_arrays(completion)
  for episode in group.episodes:
    if episode.task.id != group.task.id:
      raise errors.PoolError(
        f"episode {episode.id!r} is about task {episode.task.id!r}; its group "
        f"is about {group.task.id!r}"
      )
  tokens, forest = _merge(completions, _parents(group))
  record = {
    "codec": CODEC_VERSION,
    "lengths": [[len(c.prompt_ids), len(c.response_ids)] for c in completions],
    **forest,
    "group": _plain(group, _EPISODES),
    "episodes": [_plain(episode, _TASK) for episode in group.episodes],
  }
  try:
    text = json.dumps(record, separators=(",", ":"))
  except (TypeError, ValueError) as error:
    raise errors.PoolError(
      f"group {group.index} of task {group.task.id!r} does not fit into "
      f"JSON: {error}"
    ) from error
  return _lay_out(
    {
      "tokens": (np.int32, tokens),
      "logprobs": (np.float32, [c.logprobs for c in completions]),
      "versions": (np.int32, [c.versions for c in completions]),
      "record": (np.uint8, [np.frombuffer(text.encode(), np.uint8)]),
    }
  )


def decode(data: bytes | memoryview) -> types.Group:
  """Returns the group that `encode` wrote; arrays may share memory.

  Raises:
    PoolError: the bytes are not a group, or one of another codec.
  """
  try:
    tensors = safetensors_numpy.load(bytes(data))
    record = json.loads(tensors["record"].tobytes())
    codec = record["codec"]
  except (safetensors.SafetensorError, KeyError, ValueError) as error:
    raise errors.PoolError(
      f"{len(data)} bytes of the pool are not a group: {error!r}"
    ) from error
  if codec != CODEC_VERSION:
    raise errors.PoolError(
      f"a group was written by codec {codec}; this forge-jax reads codec "
      f"{CODEC_VERSION}"
    )
  lengths = record["lengths"]
  sequences = _unmerge(
    tensors["tokens"],
    record,
    [prompt + response for prompt, response in lengths],
  )
  arrays, end = [], 0
  for (prompt, response), sequence in zip(lengths, sequences, strict=True):
    start, end = end, end + response
    arrays.append(
      {
        "prompt_ids": sequence[:prompt],
        "response_ids": sequence[prompt:],
        "logprobs": tensors["logprobs"][start:end],
        "versions": tensors["versions"][start:end],
      }
    )
  task = _built(types.Task, record["group"]["task"])
  following = iter(arrays)
  episodes = tuple(
    _built(
      types.Episode,
      e
      | {"task": task}
      | {
        "completions": [
          _built(types.Completion, c | next(following))
          for c in e["completions"]
        ]
      },
    )
    for e in record["episodes"]
  )
  return _built(
    types.Group, record["group"] | {"task": task, "episodes": episodes}
  )


def _check_arrays(completion: types.Completion) -> None:
  length = completion.response_ids.shape
  for name, dtype in _DTYPES.items():
    array = getattr(completion, name)
    if array.dtype != dtype or array.ndim != 1:
      raise errors.PoolError(
        f"completion {completion.id!r}: {name} is {array.dtype} of shape "
        f"{array.shape}; expected {dtype} with one axis"
      )
    if name != "prompt_ids" and array.shape != length:
      raise errors.PoolError(
        f"completion {completion.id!r}: {name} has {array.shape[0]} entries "
        f"for {length[0]} response tokens"
      )


def _lay_out(
  tensors: Mapping[str, tuple[type[np.generic], Sequence[np.ndarray]]],
) -> memoryview:
  """A safetensors file of tensors with one axis.

  Source: the format's description, github.com/huggingface/safetensors: the
  header's length as uint64, the header, and the tensors, end to end.

  Args:
    tensors: by name, the dtype and the pieces that it consists of.
  """
  header, end = {}, 0
  for name, (dtype, pieces) in tensors.items():
    count, start = sum(map(len, pieces)), end
    end += count * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": _SAFETENSORS[dtype],
      "shape": [count],
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  place = 8 + len(text)
  data = np.empty(place + end, np.uint8)
  data[:place] = np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)
  for dtype, pieces in tensors.values():
    for piece in pieces:
      start, place = place, place + len(piece) * piece.itemsize
      data[start:place].view(dtype)[:] = piece
  return data.data


def _parents(group: types.Group) -> list[int]:
  """By completion, the number of its parent among all; -1: there is none."""
  parents: list[int] = []
  for episode in group.episodes:
    numbers: dict[str, int] = {}
    for completion in episode.completions:
      parents.append(numbers.get(completion.parent, -1))
      numbers[completion.id] = len(parents) - 1
  return parents


def _merge(
  completions: Sequence[types.Completion], parents: Sequence[int]
) -> tuple[list[np.ndarray], dict[str, list[int]]]:
  """Returns the forest's tokens in pieces, and what the record says of it."""
  within = [-1] * len(completions)
  for number, parent in enumerate(parents):
    # A history that grows is long and has many states: only its last is
    # sorted, and the others are compared in place.
    if (
      parent >= 0
      and within[parent] < 0
      and _extends(completions[number], completions[parent])
    ):
      within[parent] = number
  order = [number for number, child in enumerate(within) if child < 0]
  forest = {"within": within, "order": order, "shared": [0]}
  if len(order) == 1:
    (leaf,) = (completions[number] for number in order)
    return [leaf.prompt_ids, leaf.response_ids], forest
  leaves = {
    number: np.concatenate(
      [completions[number].prompt_ids, completions[number].response_ids]
    )
    for number in order
  }
  order.sort(key=lambda number: leaves[number].tobytes())
  shared, added, before = [], [], np.empty(0, np.int32)
  for number in order:
    shared.append(_common(before, leaves[number]))
    added.append(leaves[number][shared[-1] :])
    before = leaves[number]
  return added, forest | {"shared": shared}


def _extends(one: types.Completion, other: types.Completion) -> bool:
  """Whether a prompt begins with another completion's prompt and response."""
  prompt = len(other.prompt_ids)
  length = prompt + len(other.response_ids)
  return (
    len(one.prompt_ids) >= length
    and _equal(one.prompt_ids[:prompt], other.prompt_ids)
    and np.array_equal(one.prompt_ids[prompt:length], other.response_ids)
  )


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
  """Whether arrays of one length are equal; at once where they are the same."""
  where = lambda array: array.__array_interface__["data"]
  same = where(one) == where(other) and one.strides == other.strides
  return same or np.array_equal(one, other)


def _common(one: np.ndarray, other: np.ndarray) -> int:
  """Length of the common prefix."""
  length = min(len(one), len(other))
  differ = one[:length] != other[:length]
  first = int(differ.argmax()) if length else 0
  return first if length and differ[first] else length


def _unmerge(
  tokens: np.ndarray,
  forest: Mapping[str, Sequence[int]],
  lengths: Sequence[int],
) -> list[np.ndarray]:
  """The sequences that `_merge` was given.

  One that lies within another is a view of it, so that a history that grows
  takes no more memory than its last state.
  """
  sequences = [np.empty(0, np.int32)] * len(lengths)
  before, start = np.empty(0, np.int32), 0
  for number, shared in zip(forest["order"], forest["shared"], strict=True):
    end = start + lengths[number] - shared
    added = tokens[start:end]
    before = np.concatenate([before[:shared], added]) if shared else added
    sequences[number], start = before, end
  within = forest["within"]
  for number in reversed(range(len(lengths))):
    if within[number] >= 0:
      sequences[number] = sequences[within[number]][: lengths[number]]
  return sequences


def _plain(value: Any, without: frozenset[str] = frozenset()) -> Any:
  """A carrier as JSON, without its arrays."""
  kind = type(value)
  if kind in _SCALARS:
    return value
  if dataclasses.is_dataclass(kind):
    return {
      name: _plain(getattr(value, name))
      for name in _names(kind)
      if name not in without
    }
  if isinstance(value, enum.Enum):
    return value.value
  if isinstance(value, tuple):
    return [_plain(item) for item in value]
  return dict(value) if isinstance(value, Mapping) else value


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
  """A carrier's fields, but for arrays."""
  names = (field.name for field in dataclasses.fields(kind))
  return tuple(name for name in names if name not in _DTYPES)


def _built(kind: Any, value: Any) -> Any:
  """The inverse of `_plain` for a declared type."""
  if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
    declared = {field.name: field.type for field in dataclasses.fields(kind)}
    unknown = value.keys() - declared.keys()
    if unknown:
      raise errors.PoolError(
        f"a stored {kind.__name__} has fields that this forge-jax does not "
        f"know: {sorted(unknown)}"
      )
    return kind(**{k: _built(declared[k], v) for k, v in value.items()})
  if isinstance(kind, enum.EnumType):
    return kind(value)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is python_types.UnionType and value is not None:
    return _built(arguments[0], value)
  if origin is tuple and isinstance(value, (list, tuple)):
    return tuple(_built(arguments[0], item) for item in value)
  return value
