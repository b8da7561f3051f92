"""Metric events, from the trainer to files, services and displays.

Invariants:

1. Values are read one step late. A value may be a device array that is still
   being computed and reading it blocks, so `Metrics.write` keeps what it was
   given and turns it into numbers when the next event arrives, or on `flush`.
2. Events leave in the order they were written, to every writer and subscriber.
3. A resumed run repeats no event: writers drop what was recorded after the
   step that is resumed from.

This module imports no JAX.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import importlib
import json
import math
import os
import pathlib
import threading
import time as time_lib
from types import TracebackType
from typing import Any, Protocol, Self, SupportsFloat

import tensorboardX

from forge_jax import errors


@dataclasses.dataclass(frozen=True, slots=True)
class StepMetrics:
  """An event: figures that were measured at one step."""

  step: int  # trainer steps taken when they were measured
  time: float  # seconds since the epoch, when they were written
  values: Mapping[str, float]  # by the names in observe/names.py


@dataclasses.dataclass(frozen=True)
class ObserveConfig:
  """Where metrics go beside metrics.jsonl."""

  tensorboard: bool = True
  wandb_project: str = ""  # "": not to Weights & Biases


Subscriber = Callable[[StepMetrics], None]


class Writer(Protocol):
  """Where events are kept."""

  def resume_from(self, step: int) -> None:
    """Drops the events after `step` (-1: all); before the first write."""

  def write(self, event: StepMetrics) -> None:
    """Keeps one event."""

  def close(self) -> None:
    """Makes everything written durable; the writer is not used again."""


class Metrics:
  """Fans events out to writers and subscribers, one step late.

  Safe to use from several threads. Subscribers are called with events in
  order, on the thread that writes; they must be quick.
  """

  def __init__(
    self,
    writers: Sequence[Writer] = (),
    clock: Callable[[], float] = time_lib.time,
  ):
    self._writers = tuple(writers)
    self._clock = clock
    self._subscribers: list[Subscriber] = []
    self._pending: tuple[int, float, dict[str, SupportsFloat]] | None = None
    # Reentrant, so that a subscriber may write events of its own.
    self._lock = threading.RLock()

  def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
    """Calls `subscriber` with every event; returns what ends that."""
    with self._lock:
      self._subscribers.append(subscriber)

    def unsubscribe() -> None:
      with self._lock:
        self._subscribers.remove(subscriber)

    return unsubscribe

  def resume_from(self, step: int) -> None:
    """Drops recorded events after `step` (-1: all), in every writer."""
    for writer in self._writers:
      writer.resume_from(step)

  def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
    """Emits the previous event and keeps this one until the next.

    Args:
      step: trainer steps taken.
      values: numbers, or arrays of one element on any device.

    Raises:
      TypeError: a value of the previous event is not a number.
    """
    with self._lock:
      self.flush()
      self._pending = (step, self._clock(), dict(values))

  def flush(self) -> None:
    """Emits the event that is kept back, if any."""
    with self._lock:
      if self._pending is None:
        return
      step, time, values = self._pending
      self._pending = None
      event = StepMetrics(
        step, time, {n: _number(step, n, v) for n, v in values.items()}
      )
      for writer in self._writers:
        writer.write(event)
      for subscriber in tuple(self._subscribers):
        subscriber(event)

  def close(self) -> None:
    """Flushes and closes the writers."""
    with self._lock:
      self.flush()
      for writer in self._writers:
        writer.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()


class JsonlWriter:
  """Appends events to a file of JSON lines, one object an event.

  An object holds "step", "time" and the values by name. JSON knows neither
  NaN nor infinities: a value that is not finite is written as null.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self._open()

  def resume_from(self, step: int) -> None:
    """Keeps the events up to `step`; a line torn by a crash goes too."""
    self._file.close()
    partial = self._path.with_name(self._path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
      for event in read_jsonl(self._path):
        if event.step <= step:
          file.write(_encode(event))
      file.flush()
      os.fsync(file.fileno())
    partial.replace(self._path)
    self._file = self._open()

  def write(self, event: StepMetrics) -> None:
    self._file.write(_encode(event))

  def close(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()

  def _open(self):
    return self._path.open("a", buffering=1, encoding="utf-8")


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[StepMetrics]:
  """Yields the events of a JsonlWriter's file; null is read as NaN.

  A last line without its newline was torn by a crash and is left out.

  Raises:
    ForgeError: a complete line is not an event; the message names it.
  """
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      if not line.endswith("\n"):
        return
      try:
        row = json.loads(line)
        step, time = int(row.pop("step")), float(row.pop("time"))
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.ForgeError(
          f"{path}:{number}: not a metric event ({error!r}): {line[:80]!r}"
        ) from error
      values = {n: math.nan if v is None else v for n, v in row.items()}
      yield StepMetrics(step, time, values)


class TensorBoardWriter:
  """Writes event files for TensorBoard."""

  def __init__(self, folder: str | os.PathLike[str]):
    self._folder = str(folder)
    self._purge_step: int | None = None
    # Opened at the first write: the step to purge from is given to its maker.
    self._writer: tensorboardX.SummaryWriter | None = None

  def resume_from(self, step: int) -> None:
    """Makes TensorBoard hide what earlier files hold after `step`."""
    self._purge_step = step + 1

  def write(self, event: StepMetrics) -> None:
    if self._writer is None:
      self._writer = tensorboardX.SummaryWriter(
        self._folder, purge_step=self._purge_step
      )
    for name, value in event.values.items():
      self._writer.add_scalar(name, value, event.step, event.time)
    self._writer.flush()

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


class WandbWriter:
  """Logs events to Weights & Biases, for whoever has it installed.

  A resumed run goes on under the same id. The service drops rows of steps
  before its last one, so a step that is repeated is not counted twice.
  """

  def __init__(
    self,
    project: str,
    run_id: str,
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
  ):
    """Opens the run.

    Raises:
      ConfigError: the package is not installed.
    """
    try:
      wandb = importlib.import_module("wandb")
    except ImportError as error:
      raise errors.ConfigError(
        f"project {project!r} asks for Weights & Biases, but the package "
        "'wandb' cannot be imported; install forge-jax[wandb]"
      ) from error
    self._run = wandb.init(
      project=project,
      id=run_id,
      dir=str(folder),
      config=dict(config),
      resume="allow",
    )

  def resume_from(self, step: int) -> None:
    """Does nothing: the service drops the steps it already has."""

  def write(self, event: StepMetrics) -> None:
    self._run.log(dict(event.values), step=event.step)

  def close(self) -> None:
    self._run.finish()


def _encode(event: StepMetrics) -> str:
  values = {n: v if math.isfinite(v) else None for n, v in event.values.items()}
  row = {"step": event.step, "time": event.time} | values
  return json.dumps(row, allow_nan=False) + "\n"


def _number(step: int, name: str, value: SupportsFloat) -> float:
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    shape = getattr(value, "shape", None)
    raise TypeError(
      f"metric {name!r} of step {step} is not a number: "
      f"{type(value).__name__} of shape {shape}"
    ) from error
