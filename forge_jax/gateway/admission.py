"""Which requests run now, which wait, and which are turned away.

Invariants:
  1. At most `limit` permits are held at a time.
  2. Requests of one session wait in order; a permit that comes free goes to the
     waiting sessions in turn, so that no session starves another.
  3. At most `most_waiting` requests wait. When one more comes, one is refused at
     once, with the time after which it may be tried again: the newest of the
     session that would have the most waiting, so that no session fills the
     queue for all.
"""

import asyncio
import collections
from collections.abc import AsyncIterator
import contextlib
import time

from forge_jax.gateway import refusal

_SMOOTHING = 0.05  # weight of the newest request in the mean time to serve one
_SHORTEST_RETRY = 1.0  # seconds


class Admission:
  """Hands out permits; lives on one asyncio loop."""

  def __init__(self, limit: int, most_waiting: int):
    """Admits `limit` requests and lets `most_waiting` wait."""
    self._limit = limit
    self._most_waiting = most_waiting
    self._queues: collections.OrderedDict[
      str, collections.deque[asyncio.Future[None]]
    ] = collections.OrderedDict()
    self._mean_seconds = 0.0
    self.running = 0
    self.waiting = 0

  @contextlib.asynccontextmanager
  async def permit(self, session: str) -> AsyncIterator[None]:
    """Holds a permit; waits for it.

    Raises:
      Refusal: too many requests wait; status 429.
    """
    if self.running < self._limit:
      self.running += 1
    else:
      await self._wait(session)
    started = time.monotonic()
    try:
      yield
    finally:
      seconds = time.monotonic() - started
      self._mean_seconds += _SMOOTHING * (seconds - self._mean_seconds)
      self._pass_on()

  def check(self, session: str) -> None:
    """Refuses a request that would find neither a permit nor room to wait.

    Raises:
      Refusal: too many requests wait; status 429.
    """
    if self.running < self._limit or self.waiting < self._most_waiting:
      return
    waiting = len(self._queues.get(session, ()))
    if max(map(len, self._queues.values()), default=0) <= waiting + 1:
      raise self._refusal()

  def _refusal(self) -> refusal.Refusal:
    backlog = self._mean_seconds * self.waiting / self._limit
    return refusal.Refusal(
      f"{self.waiting} requests are waiting; try again later",
      status=429,
      code="rate_limit_exceeded",
      retry_after=max(_SHORTEST_RETRY, backlog),
    )

  async def _wait(self, session: str) -> None:
    self.check(session)
    if self.waiting >= self._most_waiting:
      self._make_room()
    turn = asyncio.get_running_loop().create_future()
    self._queues.setdefault(session, collections.deque()).append(turn)
    self.waiting += 1
    try:
      await turn
    except asyncio.CancelledError:
      if turn.cancelled():
        self._leave(session, turn)
      else:  # the permit had come before the client went away
        self._pass_on()
      raise

  def _make_room(self) -> None:
    """Refuses the newest request of the session that has the most waiting."""
    turn = max(self._queues.values(), key=len).pop()  # it has others
    self.waiting -= 1
    turn.set_exception(self._refusal())

  def _leave(self, session: str, turn: asyncio.Future[None]) -> None:
    queue = self._queues[session]
    queue.remove(turn)
    self.waiting -= 1
    if not queue:
      del self._queues[session]

  def _pass_on(self) -> None:
    """Gives a permit that came free to the next session in turn."""
    if not self._queues:
      self.running -= 1
      return
    session, queue = self._queues.popitem(last=False)
    turn = queue.popleft()
    self.waiting -= 1
    if queue:
      self._queues[session] = queue  # behind the others
    turn.set_result(None)
