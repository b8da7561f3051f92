"""Tokens per second, and the effective training yield.

Forge maximises J = throughput x sample efficiency under bounded update
variance and convergence. `Meter` measures the throughput, `TrainingYield` the
rest, both from what a run reports anyway.

Invariants of `Meter`: counts only grow; a part is busy while at least one of
its `busy` blocks is open, so concurrent work is not counted twice.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import enum
import math
import statistics
import threading
import time

from forge_jax.observe import metrics, names


class Part(enum.StrEnum):
  """The four parts that every token passes through."""

  ROLLOUT = "rollout"  # sampling, tokens of the responses
  TRAINING = "training"  # updates, tokens of the requests before merging
  DATA = "data"  # merging and packing, tokens of the requests
  IO = "io"  # writing to the pool and reading from it, tokens


_NAMES = {
  Part.ROLLOUT: names.THROUGHPUT_ROLLOUT,
  Part.TRAINING: names.THROUGHPUT_TRAINING,
  Part.DATA: names.THROUGHPUT_DATA,
  Part.IO: names.THROUGHPUT_IO,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Count:
  """What went through a part in a span of time."""

  tokens: int = 0
  seconds: float = 0.0  # busy

  @property
  def rate(self) -> float:
    """Tokens a busy second; 0 where nothing was busy."""
    return self.tokens / self.seconds if self.seconds > 0 else 0.0

  def __sub__(self, other: "Count") -> "Count":
    return Count(self.tokens - other.tokens, self.seconds - other.seconds)


@dataclasses.dataclass(slots=True)
class _Ledger:
  """The running count of a part; guarded by the meter's lock."""

  tokens: int = 0
  seconds: float = 0.0
  open: int = 0  # busy blocks
  since: float = 0.0  # when the first of them was opened


class Meter:
  """Counts tokens and busy seconds of the four parts; safe between threads."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._lock = threading.Lock()
    self._ledgers = {part: _Ledger() for part in Part}
    self._started = clock()
    self._last_step = {part: Count() for part in Part}

  def add(self, part: Part, tokens: int, seconds: float = 0.0) -> None:
    """Counts tokens, and busy seconds measured by the caller.

    Raises:
      ValueError: a negative count.
    """
    if tokens < 0 or seconds < 0:
      raise ValueError(
        f"{part}: {tokens} tokens in {seconds} s; counts only grow"
      )
    with self._lock:
      self._ledgers[part].tokens += tokens
      self._ledgers[part].seconds += seconds

  @contextlib.contextmanager
  def busy(self, part: Part) -> Iterator[None]:
    """A block during which the part is busy; blocks may overlap."""
    ledger = self._ledgers[part]
    with self._lock:
      if not ledger.open:
        ledger.since = self._clock()
      ledger.open += 1
    try:
      yield
    finally:
      with self._lock:
        ledger.open -= 1
        if not ledger.open:
          ledger.seconds += self._clock() - ledger.since

  def totals(self) -> Mapping[Part, Count]:
    """The counts of the whole run so far, open blocks included."""
    with self._lock:
      now = self._clock()
      return {
        part: Count(
          ledger.tokens,
          ledger.seconds + (now - ledger.since if ledger.open else 0.0),
        )
        for part, ledger in self._ledgers.items()
      }

  def end_step(self) -> Mapping[str, float]:
    """The metrics of the step that ends now.

    Returns:
      Tokens a busy second of each part since the last call, and
      "yield/throughput": tokens trained a wall-clock second of the whole run,
      which every part has handled by then, waiting included.
    """
    totals = self.totals()
    values = {
      _NAMES[part]: (totals[part] - self._last_step[part]).rate for part in Part
    }
    self._last_step = dict(totals)
    elapsed = self._clock() - self._started
    trained = totals[Part.TRAINING].tokens
    values[names.YIELD_THROUGHPUT] = trained / elapsed if elapsed > 0 else 0.0
    return values


class TrainingYield:
  """J and its two constraints, from a run's own metric events.

  Subscribe `observe` to the metrics. A resumed run feeds it the events of its
  metrics file first, and goes on where it was.

    sample efficiency = (last held-out success - first) / (samples / 1000)
    J                 = throughput x sample efficiency

  Update variance is the variance of the gradient norm over the last `window`
  steps; convergence shows as the change of the smoothed reward, whose
  exponential average has the decay 1 - 1/window.
  """

  def __init__(self, window: int = 20):
    self._decay = 1.0 - 1.0 / window
    self._grad_norms: deque[float] = deque(maxlen=window)
    self._samples = 0.0
    self._first: float | None = None
    self._last = math.nan
    self._throughput = math.nan
    self._smoothed: float | None = None
    self._change = 0.0

  def observe(self, event: metrics.StepMetrics) -> None:
    """Takes in one event."""
    values = event.values
    self._samples += values.get(names.TRAIN_SAMPLES, 0.0)
    self._throughput = values.get(names.YIELD_THROUGHPUT, self._throughput)
    if names.TRAIN_GRAD_NORM in values:
      self._grad_norms.append(values[names.TRAIN_GRAD_NORM])
    if names.TRAIN_REWARD in values:
      self._smooth(values[names.TRAIN_REWARD])
    if names.EVAL_HELDOUT in values:
      self._last = values[names.EVAL_HELDOUT]
      if self._first is None:
        self._first = self._last

  def values(self) -> Mapping[str, float]:
    """The figures so far; one that cannot be known yet is left out."""
    values = {}
    if len(self._grad_norms) > 1:
      values[names.YIELD_GRAD_NORM_VARIANCE] = statistics.pvariance(
        self._grad_norms
      )
    if self._smoothed is not None:
      values[names.YIELD_REWARD_CHANGE] = self._change
    if self._first is not None and self._samples > 0:
      efficiency = (self._last - self._first) / (self._samples / 1000)
      values[names.YIELD_EFFICIENCY] = efficiency
      if not math.isnan(self._throughput):
        values[names.YIELD_J] = self._throughput * efficiency
    return values

  def _smooth(self, reward: float) -> None:
    if self._smoothed is None:
      self._smoothed = reward
      return
    smoothed = self._decay * self._smoothed + (1.0 - self._decay) * reward
    self._change = smoothed - self._smoothed
    self._smoothed = smoothed
