"""The reward of a step: alpha * process + beta * speed + perf.

Host-side, in NumPy; float64 arrays. S counts the steps (completions) of an
episode, G the episodes of a group.
"""

import numpy as np


def speed(seconds_G: np.ndarray, success_G: np.ndarray) -> np.ndarray:
  """Reward [G] for finishing fast, between 0 and 1; 0 without success.

  h(x) = clip(1 - x/2, 0, 1) of x = seconds / median seconds of the group:
  1/2 at the usual pace, 0 from twice the usual time on. Paid to successful
  episodes only, so that speed cannot buy failure.

  Args:
    seconds_G: wall-clock of each episode, tools included; not negative.
    success_G: bool.
  """
  usual = np.median(seconds_G)
  if usual <= 0:  # nothing to compare with
    return np.zeros(len(seconds_G))
  pace_G = np.clip(1 - seconds_G / usual / 2, 0, 1)
  return np.where(success_G, pace_G, 0.0)


def cap_total(rewards_S: np.ndarray, cap: float) -> np.ndarray:
  """Steps' rewards [S], cut so that their running total stays within the cap.

  A component is capped per episode: more steps cannot collect more of it, and
  what was cut off makes up for no later penalty.
  """
  capped_S, total = np.zeros(len(rewards_S)), 0.0
  for t, reward in enumerate(rewards_S):
    new = min(max(total + reward, -cap), cap)
    capped_S[t], total = new - total, new
  return capped_S


def combine(
  process_S: np.ndarray,
  speed_S: np.ndarray,
  perf_S: np.ndarray,
  *,
  alpha: float,
  beta: float,
) -> np.ndarray:
  """Rewards [S] of an episode's steps from their components."""
  return alpha * process_S + beta * speed_S + perf_S
