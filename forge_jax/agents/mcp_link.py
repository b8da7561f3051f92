"""The host's end of MCP servers in a sandbox: their connections.

The inside end is `mcp_guest`. A connection that does not begin with the
listener's token is closed; so is one more for a number that has one.
"""

import asyncio
from collections.abc import AsyncIterator
import contextlib
import secrets
from typing import Any

import anyio

from forge_jax import errors
from forge_jax.agents.sandbox import base as sandbox_base

_MOST_LINE = 4 * sandbox_base.MIB
_CONTROL = -1  # the number of the connection that is no server's

Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Listener:
  """Where the sandbox's way out leads to; a context manager."""

  def __init__(self):
    self.token = secrets.token_hex(16)
    self._links: dict[int, asyncio.Future[Link]] = {}

  async def __aenter__(self) -> "Listener":
    """Begins to listen."""
    self._server = await asyncio.start_server(
      self._accept, "127.0.0.1", 0, limit=_MOST_LINE
    )
    return self

  async def __aexit__(self, *error: object) -> None:
    """Closes every connection."""
    self._server.close()
    for number in self._links:
      self._close(number)

  @property
  def origin(self) -> str:
    """Where it listens."""
    port = self._server.sockets[0].getsockname()[1]
    return f"http://127.0.0.1:{port}"

  async def link(self, number: int, running: asyncio.Task) -> Link:
    """The connection of a server, unless what starts it has ended.

    Raises:
      AgentError: it has.
    """
    link = self._future(number)
    await asyncio.wait([link, running], return_when=asyncio.FIRST_COMPLETED)
    if not link.done():
      raise errors.AgentError("a server was not started")
    return link.result()

  def hang_up(self) -> None:
    """Has the servers end."""
    self._close(_CONTROL)

  def _future(self, number: int) -> asyncio.Future[Link]:
    new = asyncio.get_running_loop().create_future()
    return self._links.setdefault(number, new)

  def _close(self, number: int) -> None:
    link = self._future(number)
    if link.done() and not link.cancelled():
      link.result()[1].close()
    link.cancel()  # what connects later is closed at once

  async def _accept(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    with contextlib.suppress(ValueError, OSError):
      token, _, number = (await reader.readline()).decode().partition(" ")
      link = self._future(int(number))
      if secrets.compare_digest(token, self.token) and not link.done():
        link.set_result((reader, writer))
        return
    writer.close()


@contextlib.asynccontextmanager
async def transport(
  reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> AsyncIterator[tuple[Any, Any]]:
  """A connection as the package's clients have it: lines are messages."""
  from mcp.shared import message as message_lib
  import mcp_types

  to_client, from_server = anyio.create_memory_object_stream(0)
  to_server, from_client = anyio.create_memory_object_stream(0)

  async def receive() -> None:
    async with to_client:
      # A line that is too long is a ValueError and ends it, as a reset does.
      with contextlib.suppress(ValueError, OSError, anyio.BrokenResourceError):
        while line := await reader.readline():
          try:
            message = mcp_types.jsonrpc_message_adapter.validate_json(
              line, by_name=False
            )
          except ValueError as error:
            await to_client.send(error)
          else:
            await to_client.send(message_lib.SessionMessage(message))

  async def send() -> None:
    async with from_client:
      with contextlib.suppress(OSError):
        async for one in from_client:
          text = one.message.model_dump_json(by_alias=True, exclude_unset=True)
          writer.write(text.encode() + b"\n")
          await writer.drain()

  async with anyio.create_task_group() as group:
    group.start_soon(receive)
    group.start_soon(send)
    try:
      yield from_server, to_server
    finally:
      group.cancel_scope.cancel()
      writer.close()
