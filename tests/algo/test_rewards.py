"""Reward components at hand-computed points."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np

from forge_jax.algo import rewards


def test_speed_at_known_paces():
  seconds = np.array([0.0, 5.0, 10.0, 20.0, 90.0])  # median 10
  got = rewards.speed(seconds, np.ones(5, bool))
  np.testing.assert_allclose(got, [1.0, 0.75, 0.5, 0.0, 0.0])


def test_speed_is_paid_for_success_only():
  got = rewards.speed(np.array([1.0, 1.0, 4.0]), np.array([True, False, True]))
  np.testing.assert_allclose(got, [0.5, 0.0, 0.0])


def test_without_times_there_is_no_speed_reward():
  assert rewards.speed(np.zeros(2), np.ones(2, bool)).tolist() == [0.0, 0.0]


@given(st.lists(st.floats(-3, 3), max_size=9), st.floats(0, 2))
def test_a_capped_total_stays_within_its_cap(values, cap):
  got = rewards.cap_total(np.array(values), cap)
  assert got.shape == (len(values),)
  assert (np.abs(np.cumsum(got)) <= cap + 1e-9).all()


def test_rewards_within_the_cap_are_unchanged():
  np.testing.assert_allclose(
    rewards.cap_total(np.array([0.5, 0.25, -0.5]), 1.0), [0.5, 0.25, -0.5]
  )
  np.testing.assert_allclose(
    rewards.cap_total(np.array([0.75, 0.75, 0.75, -0.5]), 1.0),
    [0.75, 0.25, 0.0, -0.5],
  )


def test_combine_weighs_the_components():
  one = np.ones(2)
  got = rewards.combine(one, 2 * one, 4 * one, alpha=0.5, beta=0.25)
  np.testing.assert_allclose(got, 5.0)
