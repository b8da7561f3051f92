"""A coroutine that waits for a change made on another thread."""

import asyncio


class Waiter:
  """Made on the coroutine's loop; it awaits `future`."""

  def __init__(self):
    self._loop = asyncio.get_running_loop()
    self.future: asyncio.Future[None] = self._loop.create_future()

  def wake(self) -> None:
    """Ends the waiting; may be called from any thread."""
    if not self._loop.is_closed():
      self._loop.call_soon_threadsafe(self._set)

  def _set(self) -> None:
    if not self.future.done():
      self.future.set_result(None)
