"""How far what is trained is from what was generated: a number in 0..1.

For figures such as durations it is the Kolmogorov-Smirnov distance, the
largest difference of the two cumulative distributions; for categories such as
domains half the sum of the differences of the shares (total variation). Either
is 0 for equal distributions and 1 for those that have nothing in common.

Two samples of one distribution differ by chance: by about 0.87 * sqrt(1/n +
1/m) for figures. `noise` is that level.
"""

import collections
from collections.abc import Hashable, Sequence
import math

import numpy as np


def distance(sample: np.ndarray, reference: np.ndarray) -> float:
  """Kolmogorov-Smirnov distance of two samples of figures.

  Args:
    sample: float [n], n > 0.
    reference: float [m], m > 0.
  """
  sample, reference = np.sort(sample), np.sort(reference)
  at = np.concatenate([sample, reference])
  below = [
    np.searchsorted(x, at, side="right") / len(x) for x in (sample, reference)
  ]
  return float(np.abs(below[0] - below[1]).max())


def category_distance(
  sample: Sequence[Hashable], reference: Sequence[Hashable]
) -> float:
  """Total variation between the shares of categories; both not empty."""
  shares = []
  for values in (sample, reference):
    counts = collections.Counter(values)
    shares.append({k: n / counts.total() for k, n in counts.items()})
  one, other = shares
  keys = one.keys() | other.keys()
  return sum(abs(one.get(k, 0.0) - other.get(k, 0.0)) for k in keys) / 2


def noise(sample: int, reference: int) -> float:
  """Mean distance of two samples of these sizes of one distribution."""
  return (
    math.sqrt(math.pi / 2) * math.log(2) * math.sqrt(1 / sample + 1 / reference)
  )
