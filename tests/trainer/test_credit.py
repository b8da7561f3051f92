"""Credit assignment on hand-computed groups."""

import dataclasses

import numpy as np
import pytest

from forge_jax import errors, types
from forge_jax.trainer import credit

PERF, PROCESS = types.Component.PERF, types.Component.PROCESS
TASK = types.Task(id="toy/train/0", domain="toy", index=0, payload={})


def _completion(size, start=0):
  return types.Completion(
    id="c",
    prompt_ids=np.arange(3, dtype=np.int32),
    response_ids=np.arange(start, start + size, dtype=np.int32),
    logprobs=np.linspace(-1, -2, size, dtype=np.float32),
    versions=np.full(size, 7, np.int32),
    stop_reason=types.StopReason.STOP,
  )


def _episode(member, sizes, rewards=(), seconds=1.0):
  """Rewards are (component, value, step)."""
  return types.Episode(
    id=f"e{member}",
    task=TASK,
    member=member,
    seed=0,
    status=types.EpisodeStatus.COMPLETED,
    completions=tuple(_completion(size) for size in sizes),
    rewards=tuple(
      types.Reward(f"r{i}", component, value, step)
      for i, (component, value, step) in enumerate(rewards)
    ),
    seconds=seconds,
  )


def _group(*episodes):
  return types.Group(index=0, task=TASK, episodes=episodes)


def _advantages(groups, **config):
  samples, _ = credit.assign_credit(groups, credit.CreditConfig(**config))
  return {s.name: float(s.advantages[0]) for s in samples}


def test_only_plain_completions_tell_of_a_mismatch():
  episode = _episode(0, [2, 3, 2], [(PERF, 1.0, None)])
  plain, biased, swapped = episode.completions
  biased = dataclasses.replace(biased, plain=False)
  swapped = dataclasses.replace(swapped, versions=np.array([7, 8], np.int32))
  episode = dataclasses.replace(episode, completions=(plain, biased, swapped))
  samples, _ = credit.assign_credit(
    [_group(episode, _episode(1, [1]))], credit.CreditConfig()
  )
  assert [s.versions.tolist() for s in samples if s.episode == "e0"] == [
    [7, 7],
    [-1, -1, -1],
    [-1, -1],
  ]


def test_outcome_credits_every_completion_of_an_episode():
  group = _group(
    _episode(0, [2, 3], [(PERF, 1.0, None)]), _episode(1, [4], [(PERF, 0.0, 0)])
  )
  samples, stats = credit.assign_credit([group], credit.CreditConfig())
  assert [s.name for s in samples] == ["e0/0", "e0/1", "e1/0"]
  assert [s.episode for s in samples] == ["e0", "e0", "e1"]
  for sample, value in zip(samples, [0.5, 0.5, -0.5], strict=True):
    np.testing.assert_array_equal(sample.advantages, np.float32(value))
    np.testing.assert_allclose(sample.weights, 1 / 9)
    assert len(sample.weights) == len(sample.response_ids)
    assert sample.weights.dtype == sample.advantages.dtype == np.float32
  assert samples[1].logprobs is group.episodes[0].completions[1].logprobs
  assert samples[1].versions.tolist() == [7, 7, 7]
  # Tokens: five at 0.5, four at -0.5.
  std = np.std([0.5] * 5 + [-0.5] * 4)
  assert stats == credit.CreditStats(
    episodes=2,
    samples=3,
    dropped_samples=0,
    response_tokens=9,
    mean_reward=0.5,
    success_rate=0.5,
    advantage_std=pytest.approx(std),
    scores=stats.scores,
  )
  assert [score.total_S.tolist() for score in stats.scores] == [[0, 1], [0]]
  assert [score.success for score in stats.scores] == [True, False]


def test_rewards_land_on_their_step_and_count_from_there_on():
  group = _group(
    _episode(
      0, [1, 1, 1], [(PROCESS, 0.5, 0), (PROCESS, -0.25, 1), (PERF, 1.0, None)]
    ),
    _episode(1, [1], [(PROCESS, 0.25, None)]),
  )
  # alpha = 2: rewards 1, -0.5, 1 and 0.5; returns 1.5, 0.5, 1 and 0.5, which
  # e1 keeps when it has ended; baselines 1, 0.5, 0.75.
  assert _advantages([group], alpha=2.0) == pytest.approx(
    {"e0/0": 0.5, "e0/2": 0.25, "e1/0": -0.5}
  )  # the second completion of e0 equals the baseline: dropped
  got = _advantages([group], alpha=0.0, gamma=0.5)
  # Returns 0.25, 0.5, 1 and 0; baselines half of that.
  assert got == pytest.approx(
    {"e0/0": 0.125, "e0/1": 0.25, "e0/2": 0.5, "e1/0": -0.125}
  )


def test_the_baseline_does_not_depend_on_when_an_episode_stopped():
  """Paid at the end: later turns of long episodes get no other baseline."""
  long = _episode(0, [1] * 4, [(PERF, 1.0, None)])
  short = [_episode(i, [1], [(PERF, 0.0, None)]) for i in (1, 2, 3)]
  got = _advantages([_group(long, *short)])
  assert [got[f"e0/{t}"] for t in range(4)] == pytest.approx([0.75] * 4)
  assert [got[f"e{i}/0"] for i in (1, 2, 3)] == pytest.approx([-0.25] * 3)


def test_groups_have_their_own_baseline_and_one_normaliser():
  easy = _group(*(_episode(i, [2], [(PERF, 1.0, None)]) for i in range(2)))
  hard = _group(
    _episode(2, [3], [(PERF, 1.0, None)]), _episode(3, [1], [(PERF, 0.0, None)])
  )
  samples, stats = credit.assign_credit([easy, hard], credit.CreditConfig())
  assert [s.name for s in samples] == ["e2/0", "e3/0"]
  assert (stats.samples, stats.dropped_samples) == (2, 2)
  # The dropped ones still count in the normaliser.
  np.testing.assert_allclose(samples[0].weights, 1 / 8)


def test_equal_fractional_rewards_are_dropped_exactly():
  group = _group(*(_episode(i, [2], [(PERF, 0.3, None)]) for i in range(7)))
  for config in ({}, {"divide_by_std": True}, {"baseline": "leave_one_out"}):
    assert _advantages([group], **config) == {}


def test_an_episode_without_completions_counts_in_the_baseline():
  group = _group(
    _episode(0, [2], [(PERF, 1.0, None)]), _episode(1, [], [(PERF, -1.0, None)])
  )
  samples, stats = credit.assign_credit([group], credit.CreditConfig())
  assert [(s.name, s.advantages[0]) for s in samples] == [("e0/0", 1.0)]
  assert stats.mean_reward == 0.0 and stats.episodes == 2
  assert stats.response_tokens == 2


def test_speed_rewards_success_only():
  group = _group(
    _episode(0, [1], [(PERF, 1.0, None)], seconds=5.0),
    _episode(1, [1], [(PERF, 1.0, None)], seconds=10.0),
    _episode(2, [1], [(PERF, 0.0, None)], seconds=10.0),
  )
  # Speed 0.75, 0.5 and 0; returns 1.75, 1.5 and 0.
  mean = 3.25 / 3
  assert _advantages([group], beta=1.0) == pytest.approx(
    {"e0/0": 1.75 - mean, "e1/0": 1.5 - mean, "e2/0": -mean}
  )


def test_leave_one_out_and_division_by_std():
  group = _group(
    _episode(0, [1], [(PERF, 1.0, None)]),
    _episode(1, [1], [(PERF, 0.5, None)]),
    _episode(2, [1], [(PERF, 0.0, None)]),
  )
  assert _advantages([group], baseline="leave_one_out") == pytest.approx(
    {"e0/0": 0.75, "e2/0": -0.75}
  )
  scale = np.std([0, 0.5, 1])
  assert _advantages([group], divide_by_std=True) == pytest.approx(
    {"e0/0": 0.5 / scale, "e2/0": -0.5 / scale}
  )


def test_without_a_baseline_what_succeeds_is_imitated():
  group = _group(
    _episode(0, [1], [(PERF, 1.0, None)]), _episode(1, [1], [(PERF, 1.0, None)])
  )
  assert _advantages([group], baseline="none") == {"e0/0": 1.0, "e1/0": 1.0}
  with pytest.raises(errors.ConfigError, match="baseline='median'"):
    credit.CreditConfig(baseline="median")


def test_components_are_capped_per_episode():
  group = _group(
    _episode(0, [1, 1], [(PROCESS, 5.0, 0), (PERF, 9.0, None)]),
    _episode(1, [1]),
  )
  # Process 0.5 on the first, perf 2 on the last: returns 2.5, 2 and 0.
  assert _advantages([group], process_cap=0.5, perf_cap=2.0) == pytest.approx(
    {"e0/0": 1.25, "e0/1": 1.0, "e1/0": -1.25}
  )


def test_nothing_given():
  samples, stats = credit.assign_credit([], credit.CreditConfig())
  assert samples == [] and stats.response_tokens == stats.mean_reward == 0


@pytest.mark.parametrize(
  "reward, message",
  [
    ((PERF, float("nan"), None), "episode e1: reward r0 is nan"),
    ((PROCESS, 1.0, 2), "episode e1: reward r0 names completion 2, .* are 2"),
    ((PROCESS, 1.0, -1), "names completion -1"),
  ],
)
def test_a_bad_reward_is_named(reward, message):
  group = _group(_episode(0, [1]), _episode(1, [1, 1], [reward]))
  with pytest.raises(errors.SampleError, match=message):
    credit.assign_credit([group], credit.CreditConfig())


def test_a_bad_config_is_refused():
  with pytest.raises(errors.ConfigError, match=r"gamma=1.5 is not in \[0, 1\]"):
    credit.CreditConfig(gamma=1.5)
  with pytest.raises(errors.ConfigError, match="process_cap=-1"):
    credit.CreditConfig(process_cap=-1)


def test_a_domain_has_factors_and_caps_of_its_own():
  rewards = [(PERF, 1.0, None), (PROCESS, -0.4, 0)]
  groups = [
    types.Group(
      index=number,
      task=dataclasses.replace(TASK, domain=domain),
      episodes=tuple(
        dataclasses.replace(e, task=dataclasses.replace(TASK, domain=domain))
        for e in (
          _episode(0, [1, 1], rewards, seconds=1.0),
          _episode(1, [1, 1], seconds=3.0),
        )
      ),
    )
    for number, domain in enumerate(("toy", "slow", "strict"))
  ]
  config = credit.CreditConfig(
    alpha=0.5,
    domains={
      "slow": {"beta": 1.0, "speed_cap": 0.25},
      "strict": {"alpha": 1.0, "process_cap": 0.1, "perf_cap": 0.5},
    },
  )
  _, stats = credit.assign_credit(groups, config)
  total = [score.total_S.tolist() for score in stats.scores[::2]]
  np.testing.assert_allclose(total, [[-0.2, 1.0], [-0.2, 1.25], [-0.1, 0.5]])
  slow = stats.scores[2]
  assert (slow.process, slow.speed, slow.perf) == (-0.4, 0.25, 1.0)
  assert slow.success and not stats.scores[3].success


@pytest.mark.parametrize(
  ("domains", "message"),
  [
    ({"toy": {"alhpa": 1.0}}, "credit.domains.toy has alhpa"),
    ({"toy": {"domains": {}}}, "credit.domains.toy has domains"),
    ({"toy": {"gamma": 2.0}}, "gamma=2.0"),
    ({"toy": {"speed_cap": -1.0}}, "speed_cap=-1.0 is negative"),
  ],
)
def test_a_domain_s_factors_must_work(domains, message):
  with pytest.raises(errors.ConfigError, match=message):
    credit.CreditConfig(domains=domains)


def _per_token(episodes, **config):
  """By episode: the weighted advantage of each of its response tokens."""
  samples, _ = credit.assign_credit(
    [_group(*episodes)], credit.CreditConfig(**config)
  )
  found = {}
  for sample in samples:
    found.setdefault(sample.episode, []).extend(
      (sample.weights * sample.advantages).tolist()
    )
  return found


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_splitting_an_episode_into_more_requests_changes_nothing(
  baseline, divide_by_std
):
  # A token's gradient is its weight times its advantage times the gradient of
  # its log-probability, which the split leaves as it is: the same context.
  rng = np.random.default_rng(0)
  for _ in range(20):
    outcomes = rng.integers(0, 2, 4)
    whole, split = [], []
    for member, outcome in enumerate(outcomes):
      sizes = rng.integers(1, 5, rng.integers(1, 4)).tolist()
      rewards = [(PERF, float(outcome), None)]
      whole.append(_episode(member, sizes, rewards))
      parts = [1] * sum(sizes) if member % 2 else [sum(sizes)]
      split.append(_episode(member, parts, rewards))
    config = {"baseline": baseline, "divide_by_std": divide_by_std}
    assert _per_token(whole, **config) == _per_token(split, **config)
