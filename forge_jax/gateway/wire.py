"""The JSON form of what the gateway's admin routes hand out and take in."""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from forge_jax import types


def completion_to_json(completion: types.Completion) -> dict[str, Any]:
  """A completion as JSON values; float32 survives the way there and back."""
  return {
    "id": completion.id,
    "prompt_ids": completion.prompt_ids.tolist(),
    "response_ids": completion.response_ids.tolist(),
    "logprobs": completion.logprobs.tolist(),
    "versions": completion.versions.tolist(),
    "stop_reason": completion.stop_reason.value,
    "parent": completion.parent,
    "fork_reason": completion.fork_reason,
    "started": completion.started,
    "finished": completion.finished,
  }


def completion_from_json(value: Mapping[str, Any]) -> types.Completion:
  """The inverse of `completion_to_json`."""
  return types.Completion(
    id=value["id"],
    prompt_ids=np.asarray(value["prompt_ids"], np.int32),
    response_ids=np.asarray(value["response_ids"], np.int32),
    logprobs=np.asarray(value["logprobs"], np.float32),
    versions=np.asarray(value["versions"], np.int32),
    stop_reason=types.StopReason(value["stop_reason"]),
    parent=value["parent"],
    fork_reason=value["fork_reason"],
    started=value["started"],
    finished=value["finished"],
  )


def reward_to_json(reward: types.Reward) -> dict[str, Any]:
  """A reward as JSON values."""
  return {
    "name": reward.name,
    "component": reward.component.value,
    "value": reward.value,
    "step": reward.step,
  }


def reward_from_json(value: Mapping[str, Any]) -> types.Reward:
  """The inverse of `reward_to_json`; `step` may be absent.

  Raises:
    ValueError: a field is missing, unknown or of the wrong type.
  """
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
