"""The way from the engine's thread back to its callers' event loops."""

import asyncio
from collections.abc import Sequence


class Stream:
  """What one caller is sent, in order; made in the caller's loop."""

  def __init__(self):
    self.loop = asyncio.get_running_loop()
    self.items: asyncio.Queue = asyncio.Queue()


def hand_over(posts: Sequence[tuple[Stream, object]]) -> None:
  """Delivers a step's results, waking each event loop once."""
  by_loop: dict[asyncio.AbstractEventLoop, list] = {}
  for stream, item in posts:
    by_loop.setdefault(stream.loop, []).append((stream, item))

  def deliver(items):
    for stream, item in items:
      stream.items.put_nowait(item)

  for loop, items in by_loop.items():
    if not loop.is_closed():
      loop.call_soon_threadsafe(deliver, items)
