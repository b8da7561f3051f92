"""A rollout host's end of a shared pool: it leases items and stores groups.

It stands where the queue stands in the trainer's process (`host.Work`).

Invariants:
  1. At most `most` items are leased at a time, so that other hosts get some.
  2. A lease is renewed until its group is stored or given back. One that was
     lost nevertheless (the database was away, the trainer began anew) is taken
     back if its ticket is on offer; if another host has it, the group is rolled
     out all the same, and the one stored first counts.
  3. A group is durable when `complete` returns, or nobody asks for it any more.
"""

import asyncio
import dataclasses
import logging
import os
import socket

from forge_jax import errors, types
from forge_jax.pool import progress, store
from forge_jax.pool import tickets as tickets_lib

_LOG = logging.getLogger(__name__)


def _name() -> str:
  return f"{socket.gethostname()}-{os.getpid()}"


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseConfig:
  """How a host leases items."""

  most: int  # items at a time
  host: str = dataclasses.field(default_factory=_name)  # unique among hosts
  seconds: float = 60.0  # of a lease that is not renewed; a third: to renew it
  poll_seconds: float = 0.5  # between looks for an item

  def __post_init__(self):
    if self.most < 1 or not self.seconds > 0 or not self.poll_seconds > 0:
      raise errors.ConfigError(
        f"leases most is {self.most}, seconds {self.seconds} and poll_seconds "
        f"{self.poll_seconds}; expected at least 1 and more than 0"
      )


class Leases:
  """Items that this host rolls out; used from one asyncio loop."""

  def __init__(
    self,
    pool: store.DataPool,
    tickets: tickets_lib.Tickets,
    config: LeaseConfig,
  ):
    """Leases from `tickets` and stores in `pool`, which was opened `leased`."""
    self._pool = pool
    self._tickets = tickets
    self._config = config
    self._held: dict[int, progress.Ticket] = {}
    self._loop = asyncio.get_running_loop()
    self._free = asyncio.Semaphore(config.most)
    self._failure: BaseException | None = None

  async def admit(self) -> progress.Ticket:
    """Waits until an item can be leased; says which.

    Raises:
      PoolError: the database fails.
      BaseException: what was passed to `fail`.
    """
    await self._free.acquire()
    try:
      while True:
        if self._failure is not None:
          raise self._failure
        ticket = await asyncio.to_thread(
          self._tickets.lease, self._config.host, self._config.seconds
        )
        if ticket is not None:
          self._held[ticket.index] = ticket
          return ticket
        await asyncio.sleep(self._config.poll_seconds)
    except BaseException:
      self._free.release()
      raise

  def release(self, index: int) -> None:
    """Gives back an item that will not be completed here."""
    del self._held[index]
    self._free.release()
    self._tickets.give_back(self._config.host, index)

  def complete(self, group: types.Group) -> None:
    """Stores a group; blocks for the disk, so it is called on other threads.

    Raises:
      PoolError: the pool refused it.
    """
    self._pool.append(group)
    if group.index not in self._pool:
      _LOG.warning("group %d is not asked for any more", group.index)
    del self._held[group.index]
    self._loop.call_soon_threadsafe(self._free.release)

  def fail(self, error: BaseException) -> None:
    """Makes every later call of `admit` raise `error`."""
    self._failure = error

  async def renew(self) -> None:
    """Renews what is held, until it is cancelled.

    Raises:
      PoolError: the database fails.
    """
    lost: set[int] = set()
    while True:
      await asyncio.sleep(self._config.seconds / 3)
      for ticket in tuple(self._held.values()):
        kept = await asyncio.to_thread(
          self._tickets.renew, self._config.host, ticket, self._config.seconds
        )
        if not kept and ticket.index in self._held:
          if ticket.index not in lost:
            _LOG.warning("the lease of group %d is lost", ticket.index)
          lost.add(ticket.index)
