"""Sandboxes that are opened before they are asked for.

Each is a sandbox like any other, used by one caller and then closed: only the
time that it takes to open is spent earlier, while others run.

Invariants:
  1. A sandbox is handed out once.
  2. At most `count` wait for each kind (limits and gateway) that was asked for.
  3. When `aclose` returns, none that waited is left.
"""

import asyncio
import collections

from forge_jax import errors
from forge_jax.agents.sandbox import base


class Ready:
  """A backend in front of another; used from one loop, `async with` closes."""

  def __init__(self, backend: base.Backend, count: int = 2):
    """Keeps `count` sandboxes of each kind ready, from its first use on.

    Raises:
      ConfigError: the count is less than 1.
    """
    if count < 1:
      raise errors.ConfigError(f"ready count is {count}; expected at least 1")
    self._backend = backend
    self._count = count
    self._waiting: dict[tuple, collections.deque[asyncio.Task]] = (
      collections.defaultdict(collections.deque)
    )

  async def open(
    self, limits: base.Limits | None = None, *, gateway: str | None = None
  ) -> base.Sandbox:
    """Hands out a sandbox, and has others opened; see `base.Backend`.

    Raises:
      SandboxError: the backend cannot make one.
    """
    waiting = self._waiting[limits, gateway]

    def begin() -> asyncio.Task:
      return asyncio.create_task(self._backend.open(limits, gateway=gateway))

    opening = waiting.popleft() if waiting else begin()
    opened = await opening
    # Not before: what cannot be opened once is not tried again and again.
    while len(waiting) < self._count:
      waiting.append(begin())
    return opened

  async def aclose(self) -> None:
    """Closes the sandboxes that wait."""
    tasks = [task for waiting in self._waiting.values() for task in waiting]
    self._waiting.clear()
    for opened in await asyncio.gather(*tasks, return_exceptions=True):
      if not isinstance(opened, BaseException):
        await opened.aclose()

  async def __aenter__(self) -> "Ready":
    """Returns the backend."""
    return self

  async def __aexit__(self, *error: object) -> None:
    """Closes the sandboxes that wait."""
    await self.aclose()
