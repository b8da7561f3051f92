import dataclasses
import json

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from forge_jax import types
from forge_jax.gateway import wire


def int32(values):
  return np.asarray(values, np.int32)


REQUESTS = st.none() | st.builds(
  types.Request,
  protocol=st.just("/messages"),
  model=st.text(),
  digest=st.just("ab"),
  kind=st.sampled_from(types.RequestKind),
  client_ids=st.dictionaries(st.text(), st.text(), max_size=2),
  retry_of=st.sampled_from([None, "s/0"]),
  arrived=st.just(0.0625),
)


@st.composite
def forests(draw):
  """Completions whose prompts extend those before them, or are roots."""
  ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(int32)
  made = []
  for number in range(draw(st.integers(0, 6))):
    parent = draw(st.sampled_from([None, *made]))
    added = draw(ids)
    before = [parent.prompt_ids, parent.response_ids] if parent else []
    response = draw(ids)
    count = len(response)
    floats = st.floats(-(2.0**100), 0, width=32)
    logprobs = draw(st.lists(floats, min_size=count, max_size=count))
    made.append(
      types.Completion(
        id=f"s/{number}",
        prompt_ids=np.concatenate([*before, added]),
        response_ids=response,
        logprobs=np.asarray(logprobs, np.float32),
        versions=np.full(count, 3, np.int32),
        stop_reason=draw(st.sampled_from(list(types.StopReason))),
        parent=parent.id if parent else None,
        fork_reason=draw(st.sampled_from([None, "tools"])),
        started=0.125,
        finished=1.5,
        first_token=draw(st.sampled_from([None, 1.25])),
        malformed=draw(st.booleans()),
        plain=draw(st.booleans()),
        delivered=draw(st.booleans()),
        request=draw(REQUESTS),
      )
    )
  return made


@hypothesis.given(forests())
def test_completions_survive_json(completions):
  text = json.dumps(wire.completions_to_json(completions))
  again = wire.completions_from_json(json.loads(text))
  assert len(again) == len(completions)
  for one, other in zip(completions, again, strict=True):
    for field in dataclasses.fields(types.Completion):
      before, after = getattr(one, field.name), getattr(other, field.name)
      if isinstance(before, np.ndarray):
        assert before.dtype == after.dtype
        before, after = before.tobytes(), after.tobytes()
      assert before == after


def test_a_prompt_is_written_once():
  turns = [
    types.Completion(
      id=f"s/{n}",
      prompt_ids=int32(range(100 + 10 * n)),
      response_ids=int32(range(100 + 10 * n, 105 + 10 * n)),
      logprobs=np.zeros(5, np.float32),
      versions=np.zeros(5, np.int32),
      stop_reason=types.StopReason.STOP,
      parent=f"s/{n - 1}" if n else None,
    )
    for n in range(3)
  ]
  added = [c["added_ids"] for c in wire.completions_to_json(turns)]
  assert added == [[*range(100)], [*range(105, 110)], [*range(115, 120)]]
  again = wire.completions_from_json(wire.completions_to_json(turns))
  assert all(
    np.shares_memory(c.prompt_ids, again[-1].prompt_ids) for c in again
  )


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


@pytest.mark.parametrize("value", [None, [], "won", 1])
def test_a_reward_is_an_object(value):
  with pytest.raises(ValueError, match="an object"):
    wire.reward_from_json(value)
