"""How far what is trained is from what was generated: a number in 0..1.

For figures such as durations it is the Kolmogorov-Smirnov distance, the
largest difference of the two cumulative distributions; for categories such as
domains half the sum of the differences of the shares (total variation). Either
is 0 for equal distributions and 1 for those that have nothing in common.

Two samples of one distribution differ by chance: by about 0.87 * sqrt(1/n +
1/m) for figures. `noise` is that level, and the meter subtracts it.

`DriftMeter` compares the groups trained lately with a longer stretch of those
generated, and says how wide a window that keeps them together may be.
"""

import collections
from collections.abc import Hashable, Iterable, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from forge_jax import errors
from forge_jax.pool import records


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


@dataclasses.dataclass(frozen=True, slots=True)
class DriftConfig:
  """What is compared, and what the window makes of it."""

  recent: int = 256  # groups trained last
  reference: int = 2048  # groups generated last
  adapt: bool = False  # whether W follows from the drift: `most` of N up to a
  # drift of `calm`, `least` of N from `alarm` on, in between linearly
  least: float = 0.1
  most: float = 1.0
  calm: float = 0.05
  alarm: float = 0.25

  def __post_init__(self):
    if not 0 < self.recent <= self.reference:
      raise errors.ConfigError(
        f"drift recent is {self.recent} and reference {self.reference}; "
        "expected 0 < recent <= reference"
      )
    for low, high in (("least", "most"), ("calm", "alarm")):
      values = getattr(self, low), getattr(self, high)
      if not 0 < values[0] < values[1] <= 1:
        raise errors.ConfigError(
          f"drift {low} is {values[0]} and {high} {values[1]}; expected "
          f"0 < {low} < {high} <= 1"
        )


class Features(NamedTuple):
  """What is compared of a group."""

  length: float  # response tokens
  domain: str
  seconds: float  # of the longest episode
  success: float  # mean perf reward


def features(group: records.GroupInfo) -> Features:
  """Those of a stored group."""
  return Features(
    group.response_tokens, group.domain, group.seconds, group.perf
  )


class DriftMeter:
  """Groups generated and groups trained, and how far they are apart."""

  def __init__(self, config: DriftConfig):
    self.config = config
    self._generated: collections.deque[Features]
    self._generated = collections.deque(maxlen=config.reference)
    self._trained: collections.deque[Features]
    self._trained = collections.deque(maxlen=config.recent)
    self.by_feature: dict[str, float] = dict.fromkeys(Features._fields, 0.0)

  @property
  def drift(self) -> float:
    """The largest distance of a feature, less what chance makes, 0..1."""
    return max(self.by_feature.values())

  def generate(self, group: Features) -> None:
    """Notes a completed group."""
    self._generated.append(group)

  def train(self, groups: Sequence[Features]) -> None:
    """Notes a batch, and measures; until `recent` are trained it is 0."""
    self._trained.extend(groups)
    if len(self._trained) < self.config.recent:
      return
    chance = noise(len(self._trained), len(self._generated))
    for place, name in enumerate(Features._fields):
      recent = [group[place] for group in self._trained]
      all_of_them = [group[place] for group in self._generated]
      compare = category_distance if name == "domain" else distance
      self.by_feature[name] = max(0.0, compare(recent, all_of_them) - chance)

  def restore(
    self, groups: Iterable[records.GroupInfo], claims: Iterable[records.Claim]
  ) -> None:
    """Notes what a run's store holds: groups, and the batches trained."""
    known = {group.index: features(group) for group in groups}
    for group in known.values():
      self.generate(group)
    trained = (index for claim in claims for index in claim.trained)
    self.train([known[index] for index in trained if index in known])

  def width(self, capacity: int) -> int:
    """W for N = `capacity`, from the last measurement."""
    config = self.config
    excess = (self.drift - config.calm) / (config.alarm - config.calm)
    share = config.most - (config.most - config.least) * min(1, max(0, excess))
    return max(1, round(share * capacity))
