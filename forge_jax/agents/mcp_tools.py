"""Tools of MCP servers, which run in the episode's sandbox.

An episode: a fresh sandbox gets the task's files, the servers are started in
it, their tools are listed and offered beside the environment's; when the agent
has ended, so do the servers, and the files come out.

A server speaks on its stdin and stdout (the stdio transport of the protocol).
The way out of the sandbox, which a black-box agent has to its gateway, is here
one to a listener of this episode (`mcp_guest`), and to nothing else.

Invariants:
  1. Whatever a server says or does not say to a call is a result to read; a
     server that cannot be started, or lists no tools, fails the episode.
  2. What comes from a server is bounded: a message by 4 MiB, a call by
     `call_seconds`, a result by `most_chars`.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any
import urllib.parse

from forge_jax import errors, types
from forge_jax.agents import base, extra_tools, mcp_link
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.tasks import base as tasks_base

_GUEST = pathlib.Path(__file__).with_name("mcp_guest.py")
_MOST_WORDS = 500  # of a server's last ones in an error
_MOST_PAGES = 20  # of a server's list of tools
_GRACE_SECONDS = 2.0  # for servers to end by themselves


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
  """An MCP server, as it is started inside the sandbox."""

  name: str
  command: tuple[str, ...]
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Texts that it needs, by path relative to the home directory.
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class McpConfig:
  """Which servers, and what they may take."""

  servers: tuple[Server, ...] = ()
  limits: sandbox_base.Limits | None = None  # None: the defaults
  start_seconds: float = 30.0  # until all servers have listed their tools
  call_seconds: float = 30.0  # of one call
  seconds: float = 3600.0  # that servers run
  most_chars: int = 4000  # of a result
  most_files: int = 1000  # that are taken out at the end
  most_bytes: int = 64 * sandbox_base.MIB

  def __post_init__(self):
    names = [server.name for server in self.servers]
    if not names or len(set(names)) < len(names):
      raise errors.ConfigError(
        f"mcp servers are {names}; expected at least one, each with a name of "
        "its own"
      )


class McpAgent:
  """Plays episodes, any number at a time, each in a sandbox of its own."""

  def __init__(
    self, agent: base.Agent, backend: sandbox_base.Backend, config: McpConfig
  ):
    """Gives an agent the tools of servers in sandboxes of a backend.

    With one server tools have their own names; with several the server's name
    and two underscores come first.

    Raises:
      ConfigError: the package `mcp` is not installed.
    """
    try:
      import mcp  # noqa: F401 only where it is used
    except ImportError as error:
      raise errors.ConfigError(
        "MCP tools need the package mcp: pip install 'forge-jax[mcp]'"
      ) from error
    self._agent = agent
    self._backend = backend
    self._config = config

  async def run(
    self, environment: tasks_base.Environment, endpoint: base.Endpoint
  ) -> types.Messages:
    """Plays one episode; returns the transcript.

    An environment that is a `tasks.base.Workspace` gives the files that servers
    find in their work directory, and gets those that are left; the first reply
    without a call ends it. To any other, such a reply is given.

    Raises:
      AgentError: a server does not start or lists no tools.
      SandboxError: the sandbox cannot be made, died, or holds too many files.
    """
    is_files = isinstance(environment, tasks_base.Workspace)
    inner = _Ending(environment) if is_files else environment
    messages, failure = (), None
    async with mcp_link.Listener() as listener:
      opened = await self._backend.open(
        self._config.limits, gateway=listener.origin
      )
      async with opened as box:
        await box.put(environment.files() if is_files else {})
        async with self._serving(box, listener) as tools:
          equipped = extra_tools.Equipped(inner, tools)
          try:
            messages = await self._agent.run(equipped, endpoint)
          except Exception as error:  # raised below: the files count
            failure = error
        if is_files:
          found = await box.get(
            most_files=self._config.most_files,
            most_bytes=self._config.most_bytes,
          )
          environment.collect(found)
    if failure is not None:
      raise failure
    return messages

  @contextlib.asynccontextmanager
  async def _serving(
    self, box: sandbox_base.Sandbox, listener: mcp_link.Listener
  ) -> AsyncIterator[Mapping[str, extra_tools.Tool]]:
    """The servers' tools while they run, by the names that are shown."""
    command = await self._install(box, listener.token)
    running = asyncio.create_task(
      box.run(command, seconds=self._config.seconds)
    )
    failure = None
    try:
      async with contextlib.AsyncExitStack() as stack:
        try:
          async with asyncio.timeout(self._config.start_seconds):
            tools = await self._connect(stack, listener, running)
        # Whatever a server and its client make of each other; raised below,
        # for the clients would wrap it.
        except Exception as error:
          failure = error
        else:
          yield tools
    except asyncio.CancelledError:
      running.cancel()
      raise
    finally:
      listener.hang_up()
      await asyncio.wait([running], timeout=2 * _GRACE_SECONDS)
      running.cancel()  # its end was kept from coming: so is the sandbox's
    if failure is not None:
      raise errors.AgentError(
        f"MCP servers: {failure!r}{_last_words(running)}"
      ) from failure

  async def _install(self, box: sandbox_base.Sandbox, token: str) -> list[str]:
    """Puts what the servers need; returns the command that starts them."""
    guest = f"{box.home}/.mcp_guest.py"
    files = {guest: _GUEST.read_bytes()}
    for server in self._config.servers:
      files |= {
        f"{box.home}/{path}": text.encode()
        for path, text in server.files.items()
      }
    await box.put(files)
    servers = [
      [
        [w.replace("{home}", box.home) for w in server.command],
        dict(server.env),
      ]
      for server in self._config.servers
    ]
    plan = {
      "port": urllib.parse.urlsplit(box.gateway).port,
      "token": token,
      "servers": servers,
      "grace": _GRACE_SECONDS,
    }
    return ["python3", guest, json.dumps(plan)]

  async def _connect(
    self,
    stack: contextlib.AsyncExitStack,
    listener: mcp_link.Listener,
    running: asyncio.Task,
  ) -> dict[str, extra_tools.Tool]:
    """Greets the servers; returns their tools."""
    import mcp

    tools = {}
    for number, server in enumerate(self._config.servers):
      link = await listener.link(number, running)
      client = mcp.Client(
        mcp_link.transport(*link),
        read_timeout_seconds=self._config.call_seconds,
      )
      await stack.enter_async_context(client)
      tools |= await self._tools(server, client)
    return tools

  async def _tools(
    self, server: Server, client: Any
  ) -> dict[str, extra_tools.Tool]:
    """What a server offers."""
    prefix = f"{server.name}__" if len(self._config.servers) > 1 else ""
    tools, cursor = {}, None
    for _ in range(_MOST_PAGES):
      page = await client.list_tools(cursor=cursor)
      for tool in page.tools:
        function = {
          "name": prefix + tool.name,
          "description": tool.description or "",
          "parameters": tool.input_schema,
        }
        tools[prefix + tool.name] = extra_tools.Tool(
          {"type": "function", "function": function},
          functools.partial(self._call, client, tool.name),
        )
      cursor = page.next_cursor
      if cursor is None:
        break
    return tools

  async def _call(self, client: Any, name: str, written: str) -> str:
    import mcp

    try:
      arguments = json.loads(written or "{}")
    except (ValueError, TypeError) as error:
      return f"error: the arguments are no JSON: {error}"
    if not isinstance(arguments, dict):
      return "error: the arguments are no JSON object"
    try:
      result = await client.call_tool(name, arguments)
    except (mcp.MCPError, RuntimeError, ValueError) as error:
      return f"error: {error}"[: self._config.most_chars]
    text = "\n".join(
      block.text if block.type == "text" else f"({block.type})"
      for block in result.content
    )
    if result.is_error:
      text = f"error: {text}"
    return text[: self._config.most_chars]


class _Ending:
  """An environment whose work is in files: a reply without a call ends it."""

  tools = ()

  def __init__(self, inner: tasks_base.Environment):
    self._inner = inner

  def reset(self) -> types.Messages:
    return self._inner.reset()

  def respond(self, reply: types.Message) -> types.Messages | None:
    calls = reply.get("tool_calls") or []
    return [
      {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": f"error: there is no tool {call['function']['name']!r}",
      }
      for call in calls
    ] or None

  def rewards(self):
    return self._inner.rewards()


def _last_words(running: asyncio.Task) -> str:
  """What the servers wrote as they ended, if they have."""
  if not running.done() or running.cancelled():
    return ""
  if running.exception() is not None:
    return f": {running.exception()}"
  words = running.result().stderr.decode(errors="replace").strip()
  return f": {words[-_MOST_WORDS:]}"
