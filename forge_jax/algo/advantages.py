"""Advantages A_t = G_t - B: reward-to-go against a baseline of the group.

Host-side, in NumPy; float64 arrays. S counts the steps (completions) of an
episode, G the episodes of a group.
"""

from collections.abc import Sequence

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


def group_baseline(
  returns: Sequence[np.ndarray], kind: str = "mean"
) -> list[np.ndarray]:
  """Baseline [S] of each episode: at step t the group's returns from there on.

  An episode that ended before step t counts with the return of its last step.
  So the baseline depends on the number t of a step, not on how the episode came
  to it or when it stops, and where only the last steps are rewarded it is one
  number. One number for all steps would be unbiased, too, and far noisier where
  steps are rewarded (experiments/reward_to_go.py). Equal returns have exactly
  that return as their mean.

  Args:
    returns: each episode's returns-to-go [S].
    kind: "mean" of the group; "leave_one_out", the mean of the other episodes;
      "none", 0: what succeeds is imitated, whatever the others did.

  Raises:
    ConfigError: leave-one-out of a single episode.
  """
  if kind == "none":
    return [np.zeros(len(returns_S)) for returns_S in returns]
  count, most = len(returns), max(map(len, returns))
  returns_GS = np.stack(
    [
      returns_S[np.minimum(np.arange(most), len(returns_S) - 1)]
      for returns_S in returns
    ]
  )
  # Averaging differences keeps rounding from making equal returns unequal.
  excess_GS = returns_GS - returns_GS[0]
  if kind == "mean":
    baseline_GS = returns_GS[0] + np.broadcast_to(
      excess_GS.mean(0), returns_GS.shape
    )
  elif count < 2:
    raise errors.ConfigError(
      f"a leave-one-out baseline needs at least 2 episodes, found {count}"
    )
  else:
    baseline_GS = returns_GS[0] + (excess_GS.sum(0) - excess_GS) / (count - 1)
  return [
    baseline_S[: len(returns_S)]
    for baseline_S, returns_S in zip(baseline_GS, returns, strict=True)
  ]


def group_scale(returns_G: np.ndarray) -> float:
  """What to divide advantages by: the returns' std, or 1 if all are equal."""
  std = float(np.std(returns_G))
  return std if std > _SMALLEST_STD else 1.0
