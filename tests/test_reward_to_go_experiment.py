"""The experiment on gradient noise, at a size that a test can afford."""

import numpy as np

from experiments import reward_to_go as experiment


def test_advantages_by_hand():
  experiment_tokens = np.full((experiment.MEMBERS, 16), 31, np.int32)
  experiment_tokens[0, 4:8] = 0  # the first request of the first episode
  sampled = experiment.responses(2)
  assert np.flatnonzero(sampled).tolist() == [4, 5, 6, 7, 10, 11, 12, 13]

  def of(arm):
    advantage_BT = experiment.advantages(experiment_tokens, 2, arm)
    assert (advantage_BT[:, ~sampled] == 0).all()
    return advantage_BT[:2, [4, 10]].tolist()

  # It earns 1/2 where its group of 8 earns 1/16 on average.
  assert of("outcome only") == [[0.4375, 0.4375], [-0.0625, -0.0625]]
  assert of("one baseline") == [[0.4375, -0.0625], [-0.0625, -0.0625]]
  assert of("reward-to-go") == [[0.4375, 0.0], [-0.0625, 0.0]]


def test_the_baseline_of_each_step_is_what_makes_gradients_quiet():
  noise = experiment.measure(4, groups=12, seed=0)
  assert noise["outcome only"].variance == 1.0
  assert (
    noise["reward-to-go"].variance < 0.9 < 2 < noise["one baseline"].variance
  )
  assert all(one.shift < 2 for one in noise.values())
