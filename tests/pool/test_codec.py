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
  tensors = safetensors_numpy.load(
    bytes(codec.encode(sample_groups.make_group()))
  )
  record = json.loads(tensors["record"].tobytes()) | {"codec": 4}
  text = json.dumps(record).encode()
  data = safetensors_numpy.save(
    {**tensors, "record": np.frombuffer(text, np.uint8)}
  )
  with pytest.raises(errors.PoolError, match="codec 4"):
    codec.decode(data)


def random_forest(rng, count):
  """Completions that extend, fork, repeat and cut one another's tokens."""
  made = [sample_groups.make_completion(rng, "0", 5, 3)]
  while len(made) < count:
    base = made[rng.integers(len(made))]
    tokens = np.concatenate([base.prompt_ids, base.response_ids])
    cut = tokens[: rng.integers(len(tokens) + 1)]
    new = sample_groups.make_completion(
      rng, str(len(made)), rng.integers(4), rng.integers(4)
    )
    prompt = np.concatenate([cut, new.prompt_ids])
    # A parent is a hint: right, or wrong, or none.
    parent = rng.choice([made[-1].id, base.id, "none", new.id])
    made.append(dataclasses.replace(new, prompt_ids=prompt, parent=str(parent)))
  return made


def distinct_tokens(completions):
  """Size of the trie, the slow way."""
  return len(
    {
      tuple(tokens[: depth + 1])
      for tokens in (
        [*c.prompt_ids.tolist(), *c.response_ids.tolist()] for c in completions
      )
      for depth in range(len(tokens))
    }
  )


@pytest.mark.parametrize("seed", range(20))
def test_a_shared_prefix_is_stored_once(seed):
  rng = np.random.default_rng(seed)
  group = sample_groups.make_group(episodes=2, turns=0)
  made = random_forest(rng, int(rng.integers(1, 30)))
  halves = made[::2], made[1::2]
  group = dataclasses.replace(
    group,
    episodes=tuple(
      dataclasses.replace(e, completions=tuple(half))
      for e, half in zip(group.episodes, halves, strict=True)
    ),
  )
  data = codec.encode(group)
  sample_groups.assert_same(group, codec.decode(data))
  tokens = safetensors_numpy.load(bytes(data))["tokens"]
  assert len(tokens) == distinct_tokens(made)


def test_a_history_that_grows_shares_its_memory():
  rng = np.random.default_rng(0)
  made = [sample_groups.make_completion(rng, "0", 50, 3)]
  for number in range(9):
    prompt = np.concatenate([made[-1].prompt_ids, made[-1].response_ids])
    new = sample_groups.make_completion(rng, f"{number + 1}", 0, 4)
    parent = str(number)
    made.append(dataclasses.replace(new, prompt_ids=prompt, parent=parent))
  (episode,) = sample_groups.make_group(episodes=1, turns=0).episodes
  group = dataclasses.replace(
    sample_groups.make_group(episodes=0),
    episodes=(dataclasses.replace(episode, completions=tuple(made)),),
  )
  (episode,) = codec.decode(codec.encode(group)).episodes
  first, *_, last = episode.completions
  assert np.shares_memory(first.prompt_ids, last.prompt_ids)


def test_views_and_copies_make_the_same_bytes():
  """Prompts that share memory are not compared token by token."""
  group = sample_groups.make_group(0, turns=4)
  (first, *others) = group.episodes
  whole = np.arange(40, dtype=np.int32)
  empty = np.empty(0, np.int32)

  def made(copy):
    return tuple(
      dataclasses.replace(
        completion,
        prompt_ids=whole[: 10 * (n + 1)].copy()
        if copy
        else whole[: 10 * n + 10],
        response_ids=empty,
        logprobs=empty.astype(np.float32),
        versions=empty,
      )
      for n, completion in enumerate(first.completions)
    )

  views, copies = (
    dataclasses.replace(
      group,
      episodes=(dataclasses.replace(first, completions=made(copy)), *others),
    )
    for copy in (False, True)
  )
  assert codec.encode(views) == codec.encode(copies)
  # The same memory read with another stride is another prompt.
  odd = list(made(copy=False))
  odd[1] = dataclasses.replace(odd[1], prompt_ids=whole[::2])
  strided = dataclasses.replace(
    group,
    episodes=(dataclasses.replace(first, completions=tuple(odd)), *others),
  )
  sample_groups.assert_same(strided, codec.decode(codec.encode(strided)))


def test_a_record_without_a_field_that_has_a_default_reads():
  group = sample_groups.make_group(episodes=1, turns=1)
  tensors = safetensors_numpy.load(bytes(codec.encode(group)))
  record = json.loads(tensors["record"].tobytes())
  del record["episodes"][0]["completions"][0]["started"]
  record["episodes"][0]["later"] = 1

  def save():
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    return safetensors_numpy.save({**tensors, "record": text})

  with pytest.raises(errors.PoolError, match=r"Episode .*know: \['later'\]"):
    codec.decode(save())
  del record["episodes"][0]["later"]
  (episode,) = codec.decode(save()).episodes
  assert episode.completions[0].started == 0.0


def test_noise_is_not_a_group():
  with pytest.raises(errors.PoolError, match="are not a group"):
    codec.decode(b"\x10" + bytes(40))
