"""What a request adds to the tokens that its model has seen."""

import asyncio
from collections.abc import Callable, Sequence
import concurrent.futures
import functools

import numpy as np

from forge_jax.gateway import template

_LONG = 2000  # characters; encoding them takes longer than a thread's turn
_threads = concurrent.futures.ThreadPoolExecutor(2, "encoder")


class Addition:
  """Token ids; those of a text are encoded once, when they are asked for."""

  def __init__(
    self,
    text: str,
    encode: Callable[[str], Sequence[int]],
    written: template.Written | None = None,
  ):
    """`written`: the whole prompt as the chat template writes it, if it does."""
    self.written = written
    self._text = text
    self._encode = encode

  @classmethod
  def of(cls, ids: Sequence[int]) -> "Addition":
    """Ids that are known."""
    return cls("", lambda _: ids)

  @functools.cached_property
  def ids(self) -> np.ndarray:
    """The ids, int32."""
    return np.asarray(self._encode(self._text), np.int32)

  async def ready(self) -> None:
    """Waits for the ids; those of a long text come from a thread."""
    if len(self._text) > _LONG:
      loop = asyncio.get_running_loop()
      await loop.run_in_executor(_threads, lambda: self.ids)
