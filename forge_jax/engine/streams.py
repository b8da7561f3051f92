"""What is sampled, on its way to the event loops of those who asked for it."""

import asyncio
import collections
from collections.abc import Sequence
import itertools

from forge_jax import errors
from forge_jax.engine import api


class Stream:
  """What one caller is sent, in order; made and read in the caller's loop.

  A caller that is behind gets all the chunks that have come as one.
  """

  def __init__(self):
    self.loop = asyncio.get_running_loop()
    self._items: collections.deque[api.TokenChunk | Exception] = (
      collections.deque()
    )
    self._come = asyncio.Event()

  def put(self, item: api.TokenChunk | Exception) -> None:
    """Adds a chunk, or the error that ends the reply."""
    self._items.append(item)
    self._come.set()

  async def take(self) -> api.TokenChunk:
    """Waits for what comes next.

    Raises:
      Exception: that was put.
    """
    await self._come.wait()
    chunks = []
    while self._items and isinstance(self._items[0], api.TokenChunk):
      chunks.append(self._items.popleft())
    failure = None if chunks else self._items.popleft()
    if not self._items:
      self._come.clear()
    if failure is not None:
      raise failure
    return _joined(chunks)


def hand_over(
  posts: Sequence[tuple[Stream, api.TokenChunk | errors.EngineError]],
) -> None:
  """Delivers a step's results, waking each event loop once."""
  by_loop: dict[asyncio.AbstractEventLoop, list] = {}
  for stream, item in posts:
    by_loop.setdefault(stream.loop, []).append((stream, item))

  def deliver(items):
    for stream, item in items:
      stream.put(item)

  for loop, items in by_loop.items():
    if not loop.is_closed():
      loop.call_soon_threadsafe(deliver, items)


def _joined(chunks: Sequence[api.TokenChunk]) -> api.TokenChunk:
  """Chunks of one reply, one after another, as one."""
  if len(chunks) == 1:
    return chunks[0]
  chain = itertools.chain.from_iterable
  return api.TokenChunk(
    tuple(chain(chunk.token_ids for chunk in chunks)),
    tuple(chain(chunk.logprobs for chunk in chunks)),
    tuple(chain(chunk.versions for chunk in chunks)),
    chunks[-1].stop_reason,
    tuple(chain(chunk.top_logprobs for chunk in chunks)),
  )
