"""A queue's batches as a Grain dataset, made ready in the background.

An element is one step's batch; it is endless. What makes arrays of the groups
is a function of the trainer's, so that the pool needs no JAX. The iterator's
state after k elements is the queue's position once those k batches are
trained, however many were claimed ahead: a checkpoint keeps it as JSON beside
the model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain

from forge_jax import types
from forge_jax.pool import queue as queue_lib


class GroupBatches(grain.IterDataset[Sequence[types.Group]]):
  """The batches of a queue; it may be iterated over by one iterator only."""

  def __init__(self, queue: queue_lib.GroupQueue, size: int):
    """Batches of `size` groups, replayed ones included."""
    super().__init__()
    self._queue, self._size = queue, size

  def __iter__(self) -> "GroupBatchIterator":
    return GroupBatchIterator(self._queue, self._size)


class GroupBatchIterator(grain.DatasetIterator[Sequence[types.Group]]):
  """Takes a batch at a time."""

  def __init__(self, queue: queue_lib.GroupQueue, size: int):
    super().__init__()
    self._queue, self._size = queue, size

  def __next__(self) -> Sequence[types.Group]:
    """Waits for a batch.

    Raises:
      PoolError: the queue is closed, or a stored group is damaged.
      BaseException: what made the queue fail.
    """
    return self._queue.take(self._size)

  def get_state(self) -> dict[str, Any]:
    """The queue's position after the batches taken so far."""
    return self._queue.position()

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from a position, before any group is admitted."""
    self._queue.restore(state)


def iterate[T](
  queue: queue_lib.GroupQueue,
  size: int,
  prepare: Callable[[Sequence[types.Group]], T],
  ahead: int,
) -> grain.DatasetIterator[T]:
  """An iterator over prepared batches.

  To end it, close the queue, then the iterator.

  Args:
    queue: where the batches come from.
    size: groups of a batch.
    prepare: what makes an element of a batch; called on another thread when
      `ahead` is not 0.
    ahead: elements kept ready, while a further one is being made; 0: each is
      made when it is asked for.
  """
  batches = GroupBatches(queue, size).map(prepare)
  if ahead:
    batches = grain.experimental.ThreadPrefetchIterDataset(
      batches, prefetch_buffer_size=ahead
    )
  return iter(batches)
