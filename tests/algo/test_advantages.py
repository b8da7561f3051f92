"""Returns and baselines against their definitions."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.algo import advantages

values = st.floats(-10, 10, allow_subnormal=False)


@given(st.lists(values, min_size=1, max_size=8), st.floats(0, 1))
def test_reward_to_go_is_the_discounted_sum(rewards, gamma):
  got = advantages.reward_to_go(np.array(rewards), gamma)
  want = [
    sum(gamma**k * r for k, r in enumerate(rewards[t:]))
    for t in range(len(rewards))
  ]
  np.testing.assert_allclose(got, want, atol=1e-9)


def test_reward_to_go_leaves_its_input_alone():
  rewards = np.array([1.0, 2.0])
  assert advantages.reward_to_go(rewards, 1.0).tolist() == [3.0, 2.0]
  assert rewards.tolist() == [1.0, 2.0]


groups = st.lists(
  st.lists(values, min_size=1, max_size=5).map(np.array),
  min_size=2,
  max_size=6,
)


def held(returns_S, step):
  """The return from a step on; of an episode that has ended, its last one."""
  return returns_S[min(step, len(returns_S) - 1)]


@given(groups)
def test_baselines(returns):
  means = advantages.group_baseline(returns)
  others = advantages.group_baseline(returns, "leave_one_out")
  for i, own_S in enumerate(returns):
    assert len(means[i]) == len(others[i]) == len(own_S)
    for step in range(len(own_S)):
      column = [held(returns_S, step) for returns_S in returns]
      np.testing.assert_allclose(means[i][step], np.mean(column), atol=1e-9)
      rest = np.delete(column, i).mean()
      np.testing.assert_allclose(others[i][step], rest, atol=1e-9)


@given(groups, st.lists(values, min_size=1, max_size=5).map(np.array))
def test_what_an_episode_does_moves_no_baseline_of_its_own(returns, other_S):
  before = advantages.group_baseline(returns, "leave_one_out")[0]
  after = advantages.group_baseline([other_S, *returns[1:]], "leave_one_out")[0]
  shared = min(len(before), len(after))
  np.testing.assert_allclose(before[:shared], after[:shared], atol=1e-9)


@given(values, st.lists(st.integers(1, 4), min_size=1, max_size=30))
def test_equal_returns_give_exactly_no_advantage(value, sizes):
  returns = [np.full(size, value) for size in sizes]
  for kind in ("mean", "leave_one_out"):
    if kind == "leave_one_out" and len(sizes) == 1:
      with pytest.raises(errors.ConfigError, match=r"at least 2.*found 1"):
        advantages.group_baseline(returns, kind)
      continue
    baselines = advantages.group_baseline(returns, kind)
    for returns_S, baseline_S in zip(returns, baselines, strict=True):
      assert (returns_S - baseline_S == 0).all()


def test_without_a_baseline_returns_are_advantages():
  returns = [np.array([1.0, 3.0]), np.array([2.0])]
  found = advantages.group_baseline(returns, "none")
  assert [b.tolist() for b in found] == [[0.0, 0.0], [0.0]]


def test_scale_is_the_std_unless_returns_are_equal():
  assert advantages.group_scale(np.array([0.0, 2.0])) == 1.0
  assert advantages.group_scale(np.array([0.0, 6.0])) == 3.0
  assert advantages.group_scale(np.full(3, 0.1)) == 1.0
