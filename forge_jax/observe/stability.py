"""The watch over a run: what drifts, what is gamed, what has collapsed.

A run is watched through its own metric events: subscribe `Stability.observe`.
An alarm is a figure over its threshold; it is logged when it begins, and counted
as long as it lasts. A collapse ends the run, with the last good checkpoint
named.

A reward is gamed where it rises while success falls: over the last steps its
mean and the success rate are strongly anticorrelated.
"""

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import logging
import math
import statistics

from forge_jax import errors
from forge_jax.observe import metrics, names

_LOG = logging.getLogger(__name__)
_LEAST_STEPS = 5  # before a trend is one
_SUCCESSFUL = 0.1  # smoothed success from which on a run can collapse
_MIXING = f"{names.NOTED}/language_mixing"


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
  """Thresholds of alarms, and what a collapse is."""

  window: int = 10  # steps that are looked at
  entropy: float = 0.01  # nats, at least
  grad_norm_spread: float = 3.0  # variance over squared mean, at most
  effective_share: float = 0.3  # of tokens, by their ratios, at least
  length_drift: float = 3.0  # factor from the first steps on, either way
  language_mixing: float = 0.2  # share of completions, at most
  failed: float = 0.5  # share of episodes, at most
  gaming: float = 0.7  # anticorrelation of a reward and success, at most
  # Collapsed: smoothed success is below this share of its best, for so long.
  collapse_share: float = 0.4
  collapse_steps: int = 5
  stop: bool = True  # ends the run at a collapse

  def __post_init__(self):
    for name in ("window", "collapse_steps"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"stability.{name} is {getattr(self, name)}; expected at least 1"
        )
    for name in ("gaming", "collapse_share", "effective_share", "failed"):
      if not 0 <= getattr(self, name) <= 1:
        raise errors.ConfigError(
          f"stability.{name} is {getattr(self, name)}; expected 0 to 1"
        )


class Stability:
  """Watches one run. A resumed run feeds it its earlier events first."""

  def __init__(self, config: StabilityConfig):
    self._config = config
    self._past: collections.deque[Mapping[str, float]] = collections.deque(
      maxlen=config.window
    )
    self._first_lengths: list[float] = []
    self._smoothed: float | None = None
    self._best = 0.0
    self._best_step = 0
    self._low_steps = 0
    self._failed_steps = 0
    self._figures: dict[str, float] = {}
    self._alarms: dict[str, str] = {}
    self._collapse: tuple[str, int] | None = None  # why; the last good step

  @property
  def alarms(self) -> Collection[str]:
    """What is wrong now, in words."""
    return list(self._alarms.values())

  def observe(self, event: metrics.StepMetrics) -> None:
    """Takes in one event; those that tell of no trainer step count for nothing."""
    values = event.values
    if names.TRAIN_SUCCESS not in values:
      return
    self._past.append(values)
    tokens = values.get(names.EPISODE_TOKENS)
    if tokens is not None and len(self._first_lengths) < _LEAST_STEPS:
      self._first_lengths.append(tokens)
    self._figures = self._measure()
    found = dict(self._judge(values))
    for name in found.keys() - self._alarms.keys():
      _LOG.warning("step %d: %s", event.step, found[name])
    self._alarms = found
    self._look_for_collapse(event)

  def values(self) -> Mapping[str, float]:
    """The figures after the last event."""
    return self._figures | {names.WATCH_ALARMS: float(len(self._alarms))}

  def check(self, checkpoints: Sequence[int]) -> None:
    """Ends the run if it has collapsed.

    Args:
      checkpoints: the steps that there are checkpoints of.

    Raises:
      CollapseError: it has; the last good checkpoint is named.
    """
    if self._collapse is None or not self._config.stop:
      return
    reason, good_step = self._collapse
    good = max((s for s in checkpoints if s <= good_step), default=None)
    if good is None:
      advice = (
        f"no checkpoint is left from step {good_step} or before: "
        "checkpoint.every and keep_every keep some"
      )
    else:
      advice = (
        f"the last good checkpoint is that of step {good}; remove the later "
        "ones to go on from it"
      )
    raise errors.CollapseError(
      f"{reason}; {advice}. stability.stop=False goes on nevertheless"
    )

  def _measure(self) -> dict[str, float]:
    figures = {}
    # A step without a gradient has no norm.
    norms = [
      values[names.TRAIN_GRAD_NORM]
      for values in self._past
      if math.isfinite(values.get(names.TRAIN_GRAD_NORM, math.nan))
    ]
    if len(norms) > 1 and statistics.fmean(norms) > 0:
      spread = statistics.pvariance(norms) / statistics.fmean(norms) ** 2
      figures[names.WATCH_GRAD_NORM_SPREAD] = spread
    length = self._past[-1].get(names.EPISODE_TOKENS)
    first = statistics.fmean(self._first_lengths or [0.0])
    if length is not None and first > 0:
      figures[names.WATCH_LENGTH_DRIFT] = length / first
    if len(self._past) >= _LEAST_STEPS:
      success = self._series(names.TRAIN_SUCCESS)
      for reward in self._rewards():
        figures[f"{names.WATCH_CORRELATION}/{reward}"] = _correlation(
          self._series(f"{names.REWARD}/{reward}"), success
        )
    return figures

  def _rewards(self) -> list[str]:
    """The rewards of the last steps."""
    found = {name.partition("/") for values in self._past for name in values}
    return sorted(reward for topic, _, reward in found if topic == names.REWARD)

  def _series(self, name: str) -> list[float]:
    """A figure over the last steps; a reward that nobody got is 0."""
    return [values.get(name, 0.0) for values in self._past]

  def _judge(self, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yields what is over its threshold, with a sentence."""
    config, figures = self._config, self._figures
    nan = math.nan
    entropy = values.get(names.TRAIN_ENTROPY, nan)
    if entropy < config.entropy:
      yield (
        "entropy",
        f"the entropy is {entropy:.3g} nats, below {config.entropy:g}: the "
        "policy hardly explores",
      )
    spread = figures.get(names.WATCH_GRAD_NORM_SPREAD, nan)
    if spread > config.grad_norm_spread:
      yield (
        "grad_norm",
        f"the gradient norm's variance is {spread:.3g} times its squared "
        f"mean, above {config.grad_norm_spread:g}",
      )
    share = values.get(names.RATIO_EFFECTIVE, nan)
    if share < config.effective_share:
      yield (
        "ratio",
        f"importance ratios leave {share:.0%} of the tokens effective, below "
        f"{config.effective_share:.0%}: the data is too old",
      )
    drift = figures.get(names.WATCH_LENGTH_DRIFT, nan)
    if drift > config.length_drift or drift < 1 / config.length_drift:
      yield (
        "length",
        f"episodes are {drift:.2g} times as long as at first, beyond a factor "
        f"of {config.length_drift:g}",
      )
    mixing = values.get(_MIXING, nan)
    if mixing > config.language_mixing:
      yield (
        "language",
        f"{mixing:.0%} of the completions mix languages, above "
        f"{config.language_mixing:.0%}",
      )
    failed = values.get(names.EPISODE_FAILED, nan)
    if failed > config.failed:
      yield (
        "failed",
        f"{failed:.0%} of the episodes failed, above {config.failed:.0%}; the "
        "rollout host's warnings say how",
      )
    yield from self._gamed()

  def _gamed(self) -> Iterator[tuple[str, str]]:
    success = self._series(names.TRAIN_SUCCESS)
    if len(success) < _LEAST_STEPS or not _rises(success, -1):
      return
    for reward in self._rewards():
      past = self._series(f"{names.REWARD}/{reward}")
      value = self._figures[f"{names.WATCH_CORRELATION}/{reward}"]
      if value < -self._config.gaming and _rises(past):
        yield (
          f"gaming {reward}",
          f"the reward {reward} rises while success falls (correlation "
          f"{value:.2f} over {len(past)} steps): it may be gamed",
        )

  def _look_for_collapse(self, event: metrics.StepMetrics) -> None:
    if self._collapse is not None:
      return
    for name in (names.TRAIN_LOSS, names.TRAIN_GRAD_NORM):
      if not math.isfinite(event.values.get(name, 0.0)):
        self._collapse = (
          f"step {event.step}: {name} is {event.values[name]}",
          event.step - 1,
        )
        return
    failed = event.values.get(names.EPISODE_FAILED, 0.0) == 1
    self._failed_steps = self._failed_steps + 1 if failed else 0
    if self._failed_steps >= self._config.collapse_steps:
      self._collapse = (
        f"step {event.step}: every episode of {self._failed_steps} steps failed",
        event.step - self._failed_steps,
      )
      return
    success = event.values[names.TRAIN_SUCCESS]
    if self._smoothed is None:
      self._smoothed = success
    self._smoothed += (success - self._smoothed) / self._config.window
    if self._smoothed >= self._best:
      self._best, self._best_step = self._smoothed, event.step
    floor = self._config.collapse_share * self._best
    low = self._best >= _SUCCESSFUL and self._smoothed < floor
    self._low_steps = self._low_steps + 1 if low else 0
    if self._low_steps >= self._config.collapse_steps:
      self._collapse = (
        f"step {event.step}: smoothed success has fallen from "
        f"{self._best:.0%} at step {self._best_step} to {self._smoothed:.0%}",
        self._best_step,
      )


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
  """Pearson's; 0 where one of the two does not change."""
  try:
    return statistics.correlation(list(a), list(b))
  except statistics.StatisticsError:
    return 0.0


def _rises(values: Sequence[float], sign: int = 1) -> bool:
  """Whether the later half of the values is above the earlier, on average."""
  values = list(values)
  half = len(values) // 2
  later, earlier = values[-half:], values[:half]
  return sign * (statistics.fmean(later) - statistics.fmean(earlier)) > 0
