"""A group as bytes and back, exactly.

A group becomes one safetensors file in memory with five tensors. The token
arrays of all its completions lie end to end, in the order of the episodes:

  prompt_ids    int32    response_ids  int32
  logprobs      float32  versions      int32
  record        uint8: everything else, as UTF-8 JSON, with the codec version
                and each completion's prompt and response length

Python's JSON writes a float with the digits that read back as the same float,
so that nothing is rounded on the way.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from forge_jax import errors, types

CODEC_VERSION = 1

_PROMPT_FIELDS = {"prompt_ids": np.dtype(np.int32)}
_RESPONSE_FIELDS = {
  "response_ids": np.dtype(np.int32),
  "logprobs": np.dtype(np.float32),
  "versions": np.dtype(np.int32),
}


def encode(group: types.Group) -> bytes:
  """Returns the group's bytes.

  Raises:
    PoolError: an array has another dtype or length than `types.Completion`
      promises, or a field that must be JSON is not.
  """
  completions = [c for e in group.episodes for c in e.completions]
  for completion in completions:
    _check_arrays(completion)
  record = {
    "codec": CODEC_VERSION,
    "index": group.index,
    "number": group.number,
    "attempt": group.attempt,
    "task": _task_record(group.task),
    "episodes": [_episode_record(e, group.task) for e in group.episodes],
  }
  try:
    text = json.dumps(record, separators=(",", ":"))
  except (TypeError, ValueError) as error:
    raise errors.PoolError(
      f"group {group.index} of task {group.task.id!r} does not fit into "
      f"JSON: {error}"
    ) from error
  tensors = {
    name: _concatenate((getattr(c, name) for c in completions), dtype)
    for name, dtype in (_PROMPT_FIELDS | _RESPONSE_FIELDS).items()
  }
  tensors["record"] = np.frombuffer(text.encode(), np.uint8)
  return safetensors_numpy.save(tensors)


def decode(data: bytes) -> types.Group:
  """Returns the group that `encode` wrote; its arrays are views of `data`.

  Raises:
    PoolError: the bytes are not a group, or one of a newer codec.
  """
  try:
    tensors = safetensors_numpy.load(data)
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
  task = types.Task(**record["task"])
  lengths = [
    (c["prompt_length"], c["response_length"])
    for e in record["episodes"]
    for c in e["completions"]
  ]
  arrays = _split(tensors, lengths)
  episodes = tuple(_episode(e, task, arrays) for e in record["episodes"])
  return types.Group(
    index=record["index"],
    task=task,
    episodes=episodes,
    number=record["number"],
    attempt=record["attempt"],
  )


def _check_arrays(completion: types.Completion) -> None:
  length = completion.response_ids.shape
  for name, dtype in (_PROMPT_FIELDS | _RESPONSE_FIELDS).items():
    array = getattr(completion, name)
    if array.dtype != dtype or array.ndim != 1:
      raise errors.PoolError(
        f"completion {completion.id!r}: {name} is {array.dtype} of shape "
        f"{array.shape}; expected {dtype} with one axis"
      )
    if name in _RESPONSE_FIELDS and array.shape != length:
      raise errors.PoolError(
        f"completion {completion.id!r}: {name} has {array.shape[0]} entries "
        f"for {length[0]} response tokens"
      )


def _concatenate(arrays: Iterable[np.ndarray], dtype: np.dtype) -> np.ndarray:
  return np.concatenate([np.empty(0, dtype), *arrays])


def _split(
  tensors: Mapping[str, np.ndarray], lengths: Sequence[tuple[int, int]]
) -> Iterable[dict[str, np.ndarray]]:
  """Yields each completion's arrays, in the order they were joined."""
  ends = list(
    itertools.accumulate(lengths, lambda a, b: (a[0] + b[0], a[1] + b[1]))
  )
  for (prompt, response), (prompt_end, response_end) in zip(
    lengths, ends, strict=True
  ):
    yield {
      name: tensors[name][prompt_end - prompt : prompt_end]
      for name in _PROMPT_FIELDS
    } | {
      name: tensors[name][response_end - response : response_end]
      for name in _RESPONSE_FIELDS
    }


def _task_record(task: types.Task) -> dict[str, Any]:
  return {
    "id": task.id,
    "domain": task.domain,
    "index": task.index,
    "payload": dict(task.payload),
  }


def _episode_record(
  episode: types.Episode, group_task: types.Task
) -> dict[str, Any]:
  if episode.task.id != group_task.id:
    raise errors.PoolError(
      f"episode {episode.id!r} is about task {episode.task.id!r}; its group "
      f"is about {group_task.id!r}"
    )
  return {
    "id": episode.id,
    "member": episode.member,
    "seed": episode.seed,
    "status": episode.status.value,
    "completions": [_completion_record(c) for c in episode.completions],
    "rewards": [
      [r.name, r.component.value, r.value, r.step] for r in episode.rewards
    ],
    "messages": [dict(m) for m in episode.messages],
    "seconds": episode.seconds,
    "error": episode.error,
  }


def _completion_record(completion: types.Completion) -> dict[str, Any]:
  return {
    "id": completion.id,
    "prompt_length": len(completion.prompt_ids),
    "response_length": len(completion.response_ids),
    "stop_reason": completion.stop_reason.value,
    "parent": completion.parent,
    "fork_reason": completion.fork_reason,
    "started": completion.started,
    "finished": completion.finished,
  }


def _episode(
  record: Mapping[str, Any],
  task: types.Task,
  arrays: Iterable[dict[str, np.ndarray]],
) -> types.Episode:
  return types.Episode(
    id=record["id"],
    task=task,
    member=record["member"],
    seed=record["seed"],
    status=types.EpisodeStatus(record["status"]),
    completions=tuple(
      _completion(c, a)
      for c, a in zip(record["completions"], arrays, strict=False)
    ),
    rewards=tuple(
      types.Reward(name, types.Component(component), value, step)
      for name, component, value, step in record["rewards"]
    ),
    messages=tuple(record["messages"]),
    seconds=record["seconds"],
    error=record["error"],
  )


def _completion(
  record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> types.Completion:
  return types.Completion(
    id=record["id"],
    stop_reason=types.StopReason(record["stop_reason"]),
    parent=record["parent"],
    fork_reason=record["fork_reason"],
    started=record["started"],
    finished=record["finished"],
    **arrays,
  )
