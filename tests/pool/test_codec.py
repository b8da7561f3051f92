"""A group survives the codec exactly; what is malformed is refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import sample_groups

from forge_jax import errors
from forge_jax.pool import codec


@pytest.mark.parametrize("episodes, turns", [(3, 2), (1, 1), (2, 0), (0, 0)])
def test_a_group_comes_back_exactly(episodes, turns):
  group = sample_groups.make_group(episodes=episodes, turns=turns)
  sample_groups.assert_same(group, codec.decode(codec.encode(group)))


def test_odd_logprobs_keep_their_bits():
  group = sample_groups.make_group(episodes=1, turns=1)
  completion = group.episodes[0].completions[0]
  completion.logprobs[0] = np.float32(-1e-42)  # a denormal
  back = codec.decode(codec.encode(group)).episodes[0].completions[0]
  assert back.logprobs.tobytes() == completion.logprobs.tobytes()


def change(group, **fields):
  """The group with fields of its first completion replaced."""
  first, *rest = group.episodes
  completion, *others = first.completions
  completion = dataclasses.replace(completion, **fields)
  first = dataclasses.replace(first, completions=(completion, *others))
  return dataclasses.replace(group, episodes=(first, *rest))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"logprobs": np.zeros(4, np.float32)}, "logprobs has 4 entries for 1"),
    ({"prompt_ids": np.zeros(2, np.int64)}, "prompt_ids is int64"),
    ({"versions": np.zeros((1, 1), np.int32)}, r"versions is int32 of shape"),
  ],
)
def test_malformed_arrays_are_refused_by_name(fields, message):
  with pytest.raises(errors.PoolError, match=message) as caught:
    codec.encode(change(sample_groups.make_group(), **fields))
  assert "'0-0'" in str(caught.value)


def test_a_payload_that_is_not_json_is_refused():
  group = sample_groups.make_group()
  task = dataclasses.replace(group.task, payload={"bad": object()})
  with pytest.raises(errors.PoolError, match=r"group 3 .*sums/train/7"):
    codec.encode(dataclasses.replace(group, task=task))


def test_an_episode_about_another_task_is_refused():
  group = sample_groups.make_group()
  task = dataclasses.replace(group.task, id="sums/train/8")
  with pytest.raises(errors.PoolError, match="sums/train/8"):
    codec.encode(dataclasses.replace(group, task=task))


def test_a_newer_codec_is_refused():
  tensors = safetensors_numpy.load(codec.encode(sample_groups.make_group()))
  record = json.loads(tensors["record"].tobytes()) | {"codec": 2}
  text = json.dumps(record).encode()
  data = safetensors_numpy.save(
    {**tensors, "record": np.frombuffer(text, np.uint8)}
  )
  with pytest.raises(errors.PoolError, match="codec 2"):
    codec.decode(data)


def test_noise_is_not_a_group():
  with pytest.raises(errors.PoolError, match="are not a group"):
    codec.decode(b"\x10" + bytes(40))
