"""The trainer's loop: take, step, publish, evaluate, commit, checkpoint.

A request to stop ends in a checkpoint. It is seen at once while the loop waits;
within a step before its first update, which gives the step up; else when the
step is done. What was given up trains after the restart.

The order within a step matters: weights are published, and an evaluation with
them is over, before the step is committed, because the commit lets the
rollout host begin groups that must be sampled from these weights.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import signal
import time
from typing import Any, Protocol

from absl import logging
import grain

from forge_jax import types
from forge_jax.observe import names
from forge_jax.pool import queue as queue_lib
from forge_jax.trainer import checkpoint as checkpoint_lib
from forge_jax.trainer import preparation
from forge_jax.trainer import trainer as trainer_lib


class Interrupted(Exception):
  """Raised where the loop waits when a stop is requested."""


class StopSignal:
  """A request to stop, by Ctrl-C or SIGTERM.

  Entered on the main thread. While the trainer computes, the request only sets
  `requested`; while it waits inside `interruptible`, the wait ends at once. A
  second Ctrl-C ends the process the usual way.
  """

  def __init__(self):
    self.requested = False
    self._waiting = False
    self._previous: dict[int, Any] = {}

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Where a stop request raises Interrupted."""
    self._waiting = True
    try:
      self.check()
      yield
    finally:
      self._waiting = False

  def check(self) -> None:
    """Raises Interrupted if a stop is requested."""
    if self.requested:
      raise Interrupted

  def _handle(self, number, frame):
    del frame
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True
    logging.warning(
      "%s: stopping with a checkpoint", signal.Signals(number).name
    )
    if self._waiting:
      raise Interrupted


class Tasks(Protocol):
  """The sequence of tasks, if what it gives depends on what was trained."""

  def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Learns what a trainer step measured."""

  def state(self) -> Mapping[str, Any]:
    """What a restart needs, as JSON."""

  def restore(self, state: Mapping[str, Any]) -> None:
    """The inverse of `state`."""


def train(
  trainer: trainer_lib.Trainer,
  batches: grain.DatasetIterator[preparation.StepBatch],
  queue: queue_lib.GroupQueue,
  tasks: Tasks,
  checkpointer: checkpoint_lib.Checkpointer,
  stop: StopSignal,
  *,
  steps: int,
  seed: int,
  publish: Callable[[types.WeightsVersion], None],
  evaluate: Callable[[int], None],
  record: Callable[[int, Mapping[str, Any]], None],
  flush: Callable[[], None],
  retire: Callable[[int], None],
) -> None:
  """Trains until `steps` steps are taken or a stop is requested.

  Either way the last state is checkpointed when this returns.

  Args:
    trainer: at its first step, or restored.
    batches: prepared ones, from `pool.dataset`, restored to the same step.
    queue: where they come from; learns of each step that is over.
    tasks: of the groups to come; learns of a step before the queue does.
    checkpointer: where checkpoints go.
    stop: entered by the caller.
    steps: trainer steps of the whole run, those before a restart included.
    seed: of the run, kept in its checkpoints; all randomness derives from it
      and from indices, so there is no other random state.
    publish: gives an engine the new weights; must copy them.
    evaluate: called after each step with the step number.
    record: called after each step with its number and metrics.
    flush: called before each checkpoint: a restart from it does not take the
      steps again whose records it has.
    retire: called when a checkpoint has been begun, with the step of the oldest
      of the newest ones: no restart needs what was consumed up to it.
  """
  saved = trainer.step if checkpointer.latest_step is not None else None
  position = batches.get_state()
  while trainer.step < steps and not stop.requested:
    started = time.perf_counter()
    try:
      with stop.interruptible():
        batch = next(batches)
      taken = time.perf_counter()
      metrics = dict(trainer.take_step(batch, give_up=stop.check))
    except Interrupted:
      break
    trained = time.perf_counter()
    # Of a batch that was taken and given up, the state keeps nothing.
    position = batches.get_state()
    publish(trainer.weights())
    metrics[names.TIME_ROLLOUT_WAIT] = taken - started
    metrics[names.TIME_TRAIN] = trained - taken
    metrics[names.TIME_STEP] = time.perf_counter() - started
    evaluate(trainer.step)
    tasks.observe(trainer.step, metrics)
    queue.commit(trainer.step)
    record(trainer.step, metrics)
    if checkpointer.due(trainer.step):
      flush()
      save(trainer, position, tasks, checkpointer, seed)
      saved = trainer.step
      if (oldest := checkpointer.oldest_step) is not None:
        retire(oldest)
  if saved != trainer.step:
    flush()
    save(trainer, position, tasks, checkpointer, seed)
  checkpointer.wait()


def save(
  trainer: trainer_lib.Trainer,
  position: Mapping[str, Any],
  tasks: Tasks,
  checkpointer: checkpoint_lib.Checkpointer,
  seed: int,
) -> None:
  """Begins a checkpoint of the trainer's state, the data's, the seed."""
  host = {
    "step": trainer.step,
    "seed": seed,
    "queue": position,
    "tasks": tasks.state(),
  }
  checkpointer.save(trainer.step, trainer.state, host)


def restore(
  trainer: trainer_lib.Trainer,
  batches: grain.DatasetIterator,
  tasks: Tasks,
  checkpointer: checkpoint_lib.Checkpointer,
) -> bool:
  """Continues from the newest checkpoint; False: there is none."""
  if checkpointer.latest_step is None:
    return False
  state, host = checkpointer.restore(trainer.state)
  trainer.restore(host["step"], state)
  batches.set_state(host["queue"])
  tasks.restore(host["tasks"])
  return True
