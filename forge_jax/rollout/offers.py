"""The trainer's end of several rollout hosts: a queue's tickets on offer.

What a queue admits is put on offer in the pool's database, where hosts of
other processes lease it (`leases.py`); what they have stored is shown to the
queue, and its ticket closed. The groups themselves never pass through here.

Invariants:
  1. One trainer offers; whoever offered before can have nothing stored any
     more when the queue reads the pool (`Tickets.take_over` comes first).
  2. A ticket is closed after its group is stored and shown, or when `run` ends.
"""

import asyncio
import contextlib

from forge_jax import errors
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import tickets as tickets_lib
from forge_jax.rollout import episode


class Offers:
  """Fills a queue with what hosts store; used from one asyncio loop."""

  def __init__(
    self,
    queue: queue_lib.GroupQueue,
    tickets: tickets_lib.Tickets,
    poll_seconds: float = 0.2,
  ):
    """Offers the tickets of a queue; `tickets` has been taken over."""
    self._queue = queue
    self._tickets = tickets
    self._poll_seconds = poll_seconds

  async def run(self) -> None:
    """Offers and collects until it is cancelled.

    Raises:
      PoolError: the database or the pool fails, or the queue is closed. The
        queue has failed with it.
    """
    try:
      async with asyncio.TaskGroup() as both:
        both.create_task(self._offer(), name="offer")
        both.create_task(self._collect(), name="collect")
    except ExceptionGroup as failures:
      failure = episode.first_failure(failures)
      self._queue.fail(failure)
      raise failure from failures
    finally:
      # Nothing may be stored that the end of the gateway has cut off.
      with contextlib.suppress(errors.PoolError):
        self._tickets.close_all()

  async def _offer(self) -> None:
    while True:
      ticket = await self._queue.admit()
      await asyncio.to_thread(self._tickets.offer, ticket)

  async def _collect(self) -> None:
    while True:
      await asyncio.to_thread(self._show_stored)
      await asyncio.sleep(self._poll_seconds)

  def _show_stored(self) -> None:
    stored = self._tickets.stored()
    for item in stored:
      self._queue.adopt(item)
    if stored:
      self._tickets.withdraw(stored)
