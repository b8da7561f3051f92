"""Runs a server until it is told to end, and lets it end well.

The first SIGTERM or Ctrl-C drains: nothing new is taken on, and what runs has
`drain_seconds` to finish. A second one ends at once.
"""

import asyncio
import signal
from typing import Protocol


class Server(Protocol):
  """What a process serves."""

  @property
  def url(self) -> str:
    """Where it listens, once started."""

  async def start(self) -> None:
    """Starts to listen."""

  async def drain(self, seconds: float) -> None:
    """Takes on nothing new, and waits for what runs, at most so long."""

  async def stop(self) -> None:
    """Ends what still runs, and everything else."""


def run(name: str, server: Server, drain_seconds: float) -> None:
  """Serves until a signal ends it; says on standard output where it listens."""
  asyncio.run(_run(name, server, drain_seconds))


async def _run(name: str, server: Server, drain_seconds: float) -> None:
  loop = asyncio.get_running_loop()
  signals: asyncio.Queue[int] = asyncio.Queue()

  def listen() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
      loop.add_signal_handler(number, signals.put_nowait, number)

  try:
    listen()
    starting = asyncio.create_task(server.start())
    if not await _before(starting, signals):
      return
    listen()  # what was started may have taken the signals
    print(f"the {name} listens on {server.url}", flush=True)
    await signals.get()
    print(f"the {name} drains, for at most {drain_seconds:g} s", flush=True)
    await _before(asyncio.create_task(server.drain(drain_seconds)), signals)
  finally:
    await server.stop()
  print(f"the {name} has ended", flush=True)


async def _before(task: asyncio.Task, signals: asyncio.Queue[int]) -> bool:
  """Whether a task ends before a signal comes; if not, it is cancelled."""
  waiting = asyncio.create_task(signals.get())
  done, pending = await asyncio.wait(
    (task, waiting), return_when=asyncio.FIRST_COMPLETED
  )
  for one in pending:
    one.cancel()
  await asyncio.gather(*pending, return_exceptions=True)
  if task in done:
    task.result()
  return task in done
