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


@given(st.lists(values, min_size=2, max_size=9))
def test_baselines(returns):
  returns_G = np.array(returns)
  mean_G = advantages.group_baseline(returns_G)
  np.testing.assert_allclose(mean_G, returns_G.mean(), atol=1e-12)
  others_G = advantages.group_baseline(returns_G, "leave_one_out")
  want = [np.delete(returns_G, i).mean() for i in range(len(returns))]
  np.testing.assert_allclose(others_G, want, atol=1e-12)


@given(values, st.integers(1, 30))
def test_equal_returns_give_exactly_no_advantage(value, count):
  returns_G = np.full(count, value)
  assert (returns_G - advantages.group_baseline(returns_G) == 0).all()
  if count == 1:
    with pytest.raises(errors.ConfigError, match=r"at least 2.*found 1"):
      advantages.group_baseline(returns_G, "leave_one_out")
    return
  baseline_G = advantages.group_baseline(returns_G, "leave_one_out")
  assert (returns_G - baseline_G == 0).all()


def test_without_a_baseline_returns_are_advantages():
  assert advantages.group_baseline(np.array([1.0, 3.0]), "none").tolist() == [
    0.0,
    0.0,
  ]


def test_scale_is_the_std_unless_returns_are_equal():
  assert advantages.group_scale(np.array([0.0, 2.0])) == 1.0
  assert advantages.group_scale(np.array([0.0, 6.0])) == 3.0
  assert advantages.group_scale(np.full(3, 0.1)) == 1.0
