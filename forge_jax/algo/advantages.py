"""Advantages A_t = G_t - B: reward-to-go against a baseline of the group.

Host-side, in NumPy; float64 arrays. S counts the steps (completions) of an
episode, G the episodes of a group. The baseline is one number an episode,
whatever the step and wherever the episode stopped: a baseline per turn would
depend on the actions that led there.
"""

import numpy as np

from forge_jax import errors

BASELINES = ("mean", "leave_one_out", "none")  # see `group_baseline`
_SMALLEST_STD = 1e-6  # below it, a group's returns are taken to be equal


def reward_to_go(
  rewards_S: np.ndarray, gamma: float | np.ndarray
) -> np.ndarray:
  """Returns [S]: G_t = r_t + gamma_t G_(t+1).

  Args:
    rewards_S: of each step.
    gamma: discount from a step to the next, the same for all or [S]. With one
      for all, G_t is the sum over tau >= t of gamma^(tau - t) r_tau.
  """
  returns_S = np.array(rewards_S, np.float64)
  gamma_S = np.broadcast_to(gamma, returns_S.shape)
  for t in range(len(returns_S) - 2, -1, -1):
    returns_S[t] += gamma_S[t] * returns_S[t + 1]
  return returns_S


def group_baseline(returns_G: np.ndarray, kind: str = "mean") -> np.ndarray:
  """Baseline [G] of each episode.

  Equal returns have exactly that return as their mean.

  Args:
    returns_G: each episode's return from its start.
    kind: "mean" of the group; "leave_one_out", the mean of the other episodes;
      "none", 0: what succeeds is imitated, whatever the others did.

  Raises:
    ConfigError: leave-one-out of a single episode.
  """
  count = len(returns_G)
  if kind == "none":
    return np.zeros(count)
  # Averaging differences keeps rounding from making equal returns unequal.
  excess_G = returns_G - returns_G[0]
  if kind == "mean":
    return np.full(count, returns_G[0] + excess_G.mean())
  if count < 2:
    raise errors.ConfigError(
      f"a leave-one-out baseline needs at least 2 episodes, found {count}"
    )
  return returns_G[0] + (excess_G.sum() - excess_G) / (count - 1)


def group_scale(returns_G: np.ndarray) -> float:
  """What to divide advantages by: the returns' std, or 1 if all are equal."""
  std = float(np.std(returns_G))
  return std if std > _SMALLEST_STD else 1.0
