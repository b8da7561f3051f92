"""Which requests run now, which wait, and which are turned away.

Invariants:
  1. At most `limit` permits are held at a time.
  2. Requests of one session wait in order; a permit that comes free goes to the
     waiting sessions in turn, so that no session starves another.
  3. At most `most_waiting` requests wait, with bodies of at most `most_bytes`.
     When one more comes, others are refused at once, with the time after which
     they may be tried again: the newest of the session that would have the most
     waiting, by the measure that is full, so that no session fills the queue
     for all.
"""

import asyncio
import collections
from collections.abc import AsyncIterator
import contextlib
import math
import time

from forge_jax.gateway import refusal

_SMOOTHING = 0.05  # weight of the newest request in the mean time to serve one
_SHORTEST_RETRY = 1.0  # seconds


class _Queue:
  """The requests of one session that wait, in order."""

  def __init__(self):
    self.turns: collections.OrderedDict[asyncio.Future[None], int] = (
      collections.OrderedDict()  # with the bytes of their bodies
    )
    self.bytes = 0

  def add(self, turn: asyncio.Future[None], size: int) -> None:
    self.turns[turn] = size
    self.bytes += size

  def pop(self, turn: asyncio.Future[None]) -> int:
    size = self.turns.pop(turn)
    self.bytes -= size
    return size


class Admission:
  """Hands out permits; lives on one asyncio loop."""

  def __init__(
    self, limit: int, most_waiting: int, most_bytes: float = math.inf
  ):
    """Admits `limit` requests; lets so many, with so many bytes, wait."""
    self._limit = limit
    self._most_waiting = most_waiting
    self._most_bytes = most_bytes
    self._queues: collections.OrderedDict[str, _Queue] = (
      collections.OrderedDict()
    )
    self._mean_seconds = 0.0
    self.running = 0
    self.waiting = 0
    self.waiting_bytes = 0

  @contextlib.asynccontextmanager
  async def permit(self, session: str, size: int = 0) -> AsyncIterator[None]:
    """Holds a permit; waits for it, holding a body of `size` bytes.

    Raises:
      Refusal: too many requests wait; status 429.
    """
    if self.running < self._limit:
      self.running += 1
    else:
      await self._wait(session, size)
    started = time.monotonic()
    try:
      yield
    finally:
      seconds = time.monotonic() - started
      self._mean_seconds += _SMOOTHING * (seconds - self._mean_seconds)
      self._pass_on()

  def check(self, session: str, size: int = 0) -> None:
    """Refuses a request that would find neither a permit nor room to wait.

    Raises:
      Refusal: too many requests wait; status 429.
    """
    if self.running >= self._limit and not self._fits(size):
      self._largest(session, size)

  def _fits(self, size: int) -> bool:
    return (
      self.waiting < self._most_waiting
      and self.waiting_bytes + size <= self._most_bytes
    )

  def _largest(self, session: str, size: int) -> str:
    """The session that waits with more than one's own and one request more.

    Raises:
      Refusal: there is none; status 429.
    """

    def measure(name: str, more: tuple[int, int] = (0, 0)) -> int:
      queue = self._queues.get(name, _Queue())
      by_count = self.waiting >= self._most_waiting
      return len(queue.turns) + more[0] if by_count else queue.bytes + more[1]

    largest = max(self._queues, key=measure, default=session)
    if measure(largest) <= measure(session, (1, size)):
      raise self._refusal()
    return largest

  def _refusal(self) -> refusal.Refusal:
    backlog = self._mean_seconds * self.waiting / self._limit
    return refusal.Refusal(
      f"{self.waiting} requests are waiting; try again later",
      status=429,
      code="rate_limit_exceeded",
      retry_after=max(_SHORTEST_RETRY, backlog),
    )

  async def _wait(self, session: str, size: int) -> None:
    while not self._fits(size):
      largest = self._largest(session, size)
      turn = next(reversed(self._queues[largest].turns))
      self._leave(largest, turn)
      turn.set_exception(self._refusal())
    turn = asyncio.get_running_loop().create_future()
    self._queues.setdefault(session, _Queue()).add(turn, size)
    self.waiting += 1
    self.waiting_bytes += size
    try:
      await turn
    except asyncio.CancelledError:
      if turn.cancelled():
        self._leave(session, turn)
      elif turn.exception() is None:  # the permit had come before
        self._pass_on()
      raise

  def _leave(self, session: str, turn: asyncio.Future[None]) -> None:
    queue = self._queues[session]
    self.waiting_bytes -= queue.pop(turn)
    self.waiting -= 1
    if not queue.turns:
      del self._queues[session]

  def _pass_on(self) -> None:
    """Gives a permit that came free to the next session in turn."""
    if not self._queues:
      self.running -= 1
      return
    session, queue = next(iter(self._queues.items()))
    turn = next(iter(queue.turns))
    self._leave(session, turn)
    if session in self._queues:
      self._queues.move_to_end(session)  # behind the others
    turn.set_result(None)
