import json

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from forge_jax import types
from forge_jax.gateway import wire


@hypothesis.given(
  logprobs=st.lists(st.floats(-(2.0**100), 0, width=32), max_size=8),
  stop_reason=st.sampled_from(list(types.StopReason)),
)
def test_a_completion_survives_json(logprobs, stop_reason):
  count = len(logprobs)
  completion = types.Completion(
    id="s/1",
    prompt_ids=np.asarray([1, 2**31 - 1], np.int32),
    response_ids=np.arange(count, dtype=np.int32),
    logprobs=np.asarray(logprobs, np.float32),
    versions=np.full(count, 3, np.int32),
    stop_reason=stop_reason,
    parent="s/0",
    fork_reason="tools",
    started=0.125,
    finished=1.5,
  )
  text = json.dumps(wire.completion_to_json(completion))
  again = wire.completion_from_json(json.loads(text))
  for name in ("prompt_ids", "response_ids", "logprobs", "versions"):
    one, other = getattr(completion, name), getattr(again, name)
    assert one.dtype == other.dtype
    assert one.tobytes() == other.tobytes()
  assert again.stop_reason is stop_reason
  assert (again.parent, again.fork_reason) == ("s/0", "tools")
  assert (again.started, again.finished) == (0.125, 1.5)


def test_rewards():
  reward = types.Reward("format", types.Component.PROCESS, -0.5, 3)
  assert wire.reward_from_json(wire.reward_to_json(reward)) == reward
  assert wire.reward_from_json({"name": "won", "value": 1}) == types.Reward(
    "won", types.Component.PERF, 1.0
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"name": ""}, "name"),
    ({"value": "1"}, "number"),
    ({"value": True}, "number"),
    ({"component": "speed"}, "'speed'"),
    ({"component": ["perf"]}, "perf"),
    ({"step": 1.5}, "integer step"),
    ({"weight": 1}, "'weight'"),
  ],
)
def test_a_reward_that_is_none(change, message):
  with pytest.raises(ValueError, match=message):
    wire.reward_from_json({"name": "won", "value": 1, **change})
