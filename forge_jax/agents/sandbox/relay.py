"""The host's end of a sandbox's only way out: a socket file to the gateway.

What connects to the file is joined to one TCP address, byte for byte. A few
connections at a time are: one more is closed at once, for each costs this
process two descriptors and a buffer.
"""

import asyncio
import contextlib
import os
import ssl
import urllib.parse

from forge_jax import errors

_MOST_CONNECTIONS = 64
_CHUNK = 65536


class Relay:
  """Listens at a socket file until it is closed."""

  def __init__(self, origin: str):
    """Prepares a relay to an origin such as "http://127.0.0.1:8080".

    Raises:
      ConfigError: that is no origin.
    """
    parts = urllib.parse.urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise errors.ConfigError(
        f"the gateway is {origin!r}; expected http://host:port or https://..."
      )
    secure = parts.scheme == "https"
    self._address = parts.hostname, parts.port or (443 if secure else 80)
    # The program inside speaks plain HTTP; the encryption begins here.
    self._tls = ssl.create_default_context() if secure else None
    self._server: asyncio.Server | None = None
    self._running: set[asyncio.Task] = set()

  async def start(self, path: str) -> None:
    """Listens at a path; whoever can reach the file may connect."""
    self._server = await asyncio.start_unix_server(self._accept, path)
    os.chmod(path, 0o666)

  async def aclose(self) -> None:
    """Ends every connection."""
    if self._server is not None:
      self._server.close()
    for task in self._running:
      task.cancel()
    await asyncio.gather(*self._running, return_exceptions=True)

  async def _accept(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    if len(self._running) >= _MOST_CONNECTIONS:
      writer.close()
      return
    task = asyncio.current_task()
    self._running.add(task)
    try:
      await self._join(reader, writer)
    except (OSError, asyncio.CancelledError):
      pass  # an end is gone, or the sandbox is: the other end sees it below
    finally:
      self._running.discard(task)
      writer.close()

  async def _join(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    outer_reader, outer_writer = await asyncio.open_connection(
      *self._address, ssl=self._tls
    )
    try:
      async with asyncio.TaskGroup() as both:
        both.create_task(_pump(reader, outer_writer))
        both.create_task(_pump(outer_reader, writer))
    except* OSError:
      pass
    finally:
      outer_writer.close()


async def _pump(
  source: asyncio.StreamReader, sink: asyncio.StreamWriter
) -> None:
  while data := await source.read(_CHUNK):
    sink.write(data)
    await sink.drain()
  if sink.can_write_eof():
    with contextlib.suppress(OSError):
      sink.write_eof()
