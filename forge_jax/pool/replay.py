"""Replay: groups of recent steps that are trained once more.

Which ones is a function of the seed, the step and the pool's claims, so that a
step that is repeated after a crash replays the same groups.
"""

from collections.abc import Sequence

import numpy as np

from forge_jax import types
from forge_jax.pool import store as store_lib


class Replay:
  """Draws groups that were trained before."""

  def __init__(
    self, pool: store_lib.DataPool, count: int, steps: int, seed: int
  ):
    """Draws `count` groups from the `steps` steps before the one at hand."""
    self.count = count
    self._pool, self._steps, self._seed = pool, steps, seed

  def draw(self, step: int) -> list[int]:
    """Distinct indices of stored groups, ascending.

    Fewer than `count` where the steps before have fewer.

    Args:
      step: number of the step that will train them.
    """
    candidates = [
      index
      for claim in self._pool.claims(step - self._steps)
      if claim.step < step
      for index in claim.trained
      if index in self._pool  # retention may have taken it
    ]
    rng = np.random.default_rng([self._seed, step])
    count = min(self.count, len(candidates))
    chosen = rng.choice(len(candidates), count, replace=False)
    return sorted(candidates[i] for i in chosen)


def spread(
  fresh: Sequence[types.Group], old: Sequence[types.Group]
) -> list[types.Group]:
  """Both in one list, the old ones at even distances."""
  batch = list(fresh)
  for place, group in enumerate(old):
    batch.insert(
      (place + 1) * (len(fresh) + 1) // (len(old) + 1) + place, group
    )
  return batch
