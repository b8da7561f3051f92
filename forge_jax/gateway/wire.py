"""The JSON form of what the gateway's admin routes hand out and take in."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from forge_jax import types


def completions_to_json(
  completions: Sequence[types.Completion],
) -> list[dict[str, Any]]:
  """A session's completions as JSON values; float32 survives there and back.

  A prompt is written as the tokens that it adds to its parent's prompt and
  response, so that an episode takes room for its length, not its square.

  Args:
    completions: each after its parent, which is among them.
  """
  sizes = {c.id: len(c.prompt_ids) + len(c.response_ids) for c in completions}
  return [
    {
      "id": c.id,
      "added_ids": c.prompt_ids[sizes[c.parent] if c.parent else 0 :].tolist(),
      "response_ids": c.response_ids.tolist(),
      "logprobs": c.logprobs.tolist(),
      "versions": c.versions.tolist(),
      "stop_reason": c.stop_reason.value,
      "parent": c.parent,
      "fork_reason": c.fork_reason,
      "started": c.started,
      "finished": c.finished,
      "first_token": c.first_token,
      "malformed": c.malformed,
      "plain": c.plain,
      "delivered": c.delivered,
      "request": request_to_json(c.request),
    }
    for c in completions
  ]


def completions_from_json(
  values: Sequence[Mapping[str, Any]],
) -> tuple[types.Completion, ...]:
  """The inverse of `completions_to_json`.

  A prompt that another goes on from is a view of the other's.
  """
  responses = {
    value["id"]: np.asarray(value["response_ids"], np.int32) for value in values
  }
  prompts = _prompts(values, responses)
  return tuple(
    types.Completion(
      id=value["id"],
      prompt_ids=prompts[value["id"]],
      response_ids=responses[value["id"]],
      logprobs=np.asarray(value["logprobs"], np.float32),
      versions=np.asarray(value["versions"], np.int32),
      stop_reason=types.StopReason(value["stop_reason"]),
      parent=value["parent"],
      fork_reason=value["fork_reason"],
      started=value["started"],
      finished=value["finished"],
      first_token=value["first_token"],
      malformed=value["malformed"],
      plain=value["plain"],
      delivered=value["delivered"],
      request=request_from_json(value["request"]),
    )
    for value in values
  )


def _prompts(
  values: Sequence[Mapping[str, Any]], responses: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """By id, the prompt of each completion; only the longest are copies."""
  by_id = {value["id"]: value for value in values}
  prompts: dict[str, np.ndarray] = {}
  for value in reversed(values):
    if value["id"] in prompts:
      continue
    lineage = [value]  # the completion and those before it
    while (parent := lineage[-1]["parent"]) is not None:
      lineage.append(by_id[parent])
    pieces, ends, end = [], [], 0
    for one in reversed(lineage):
      added = np.asarray(one["added_ids"], np.int32)
      ends.append(end + len(added))
      pieces += [added, responses[one["id"]]]
      end = ends[-1] + len(responses[one["id"]])
    prompt = np.concatenate(pieces[:-1])
    for one, end in zip(reversed(lineage), ends, strict=True):
      prompts.setdefault(one["id"], prompt[:end])
  return prompts


def request_to_json(request: types.Request | None) -> dict[str, Any] | None:
  """What asked for a completion, as JSON values."""
  if request is None:
    return None
  return {**dataclasses.asdict(request), "kind": request.kind.value}


def request_from_json(value: Mapping[str, Any] | None) -> types.Request | None:
  """The inverse of `request_to_json`."""
  if value is None:
    return None
  return types.Request(**{**value, "kind": types.RequestKind(value["kind"])})


def reward_to_json(reward: types.Reward) -> dict[str, Any]:
  """A reward as JSON values."""
  return {
    "name": reward.name,
    "component": reward.component.value,
    "value": reward.value,
    "step": reward.step,
  }


def reward_from_json(value: Any) -> types.Reward:
  """The inverse of `reward_to_json`; `step` may be absent.

  Raises:
    ValueError: a field is missing, unknown or of the wrong type.
  """
  if not isinstance(value, dict):
    raise ValueError(f"a reward is an object, not {value!r:.80}")
  unknown = set(value) - {"name", "component", "value", "step"}
  if unknown:
    raise ValueError(f"a reward has no field {sorted(unknown)[0]!r}")
  name, number, step = (value.get(k) for k in ("name", "value", "step"))
  if not isinstance(name, str) or not name:
    raise ValueError(f"a reward's name is a non-empty string, not {name!r}")
  if isinstance(number, bool) or not isinstance(number, int | float):
    raise ValueError(f"reward {name!r} has a number as value, not {number!r}")
  if not math.isfinite(number):
    raise ValueError(f"reward {name!r} is {number}; it must be finite")
  if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
    raise ValueError(f"reward {name!r} has an integer step, not {step!r}")
  component = value.get("component", types.Component.PERF.value)
  if component not in list(types.Component):
    raise ValueError(
      f"reward {name!r} has component 'perf' or 'process', not {component!r}"
    )
  return types.Reward(name, types.Component(component), float(number), step)
