"""Tools of real MCP servers in the sandbox, called by a scripted model."""

import asyncio
import json
import os
import sys
import sysconfig

import pytest

from forge_jax import errors, types
from forge_jax.agents import mcp_link, mcp_tools, react
from forge_jax.agents.sandbox import bubblewrap, unsafe
from forge_jax.gateway import client, scripted
from forge_jax.rollout import episode as episode_lib

# A server made with the package's own server side.
SERVER = """
import os, pathlib, sys, time
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("desk")
calls = 0

@server.tool()
def add(a: int, b: int) -> int:
  "Adds two numbers."
  return a + b

@server.tool()
def note(text: str) -> str:
  "Writes a note, and says how many there were before."
  global calls
  calls += 1
  pathlib.Path(f"note{calls}.txt").write_text(text)
  return str(calls - 1)

@server.tool()
def fail() -> str:
  "Fails."
  raise ToolError("no luck")

@server.tool()
def sleep(seconds: float) -> str:
  "Takes its time."
  time.sleep(seconds)
  return "slept"

@server.tool()
def shout() -> str:
  "Says much."
  return "a" * 100_000

@server.tool()
def leave() -> str:
  "Ends the server."
  os._exit(3)

server.run()
"""
PACKAGES = os.path.realpath(sysconfig.get_path("purelib"))


def desk(name="desk", command=("python3", "{home}/desk.py"), **fields):
  return mcp_tools.Server(
    name,
    command,
    files={"desk.py": SERVER},
    env={"PYTHONPATH": PACKAGES},
    **fields,
  )


class Notes:
  """Wants notes written."""

  tools = ()
  left = None

  def reset(self):
    return [{"role": "user", "content": "Write a note."}]

  def files(self):
    return {"old.txt": b"old"}

  def collect(self, files):
    self.left = files

  def rewards(self):
    value = float("note1.txt" in (self.left or {}))
    return [types.Reward("noted", types.Component.PERF, value)]


class Sums:
  """Wants a number, and has a tool of its own."""

  tools = (
    {
      "type": "function",
      "function": {"name": "one", "parameters": {"type": "object"}},
    },
  )

  def __init__(self):
    self.answer = None

  def reset(self):
    return [{"role": "user", "content": "Add."}]

  def respond(self, reply):
    if "tool_calls" not in reply:
      self.answer = reply["content"]
      return None
    return [
      {"role": "tool", "tool_call_id": call["id"], "content": "1"}
      for call in reply["tool_calls"]
    ]

  def rewards(self):
    value = float(self.answer == "5")
    return [types.Reward("sum", types.Component.PERF, value)]


@pytest.fixture(params=["bubblewrap", "unsafe"])
def backend(request):
  if request.param == "unsafe":
    return unsafe.UnsafeProcess()
  try:
    return bubblewrap.Bubblewrap(bubblewrap.BubblewrapConfig(show=(PACKAGES,)))
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))


def call(name, **arguments):
  written = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{written}\n</tool_call>"


async def play(replies, backend, environment, *servers, **config):
  """One episode; what tools answered, and what the model was shown first."""
  config = {"servers": servers or (desk(),)} | config
  with scripted.serve(replies) as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    inner = react.ReactAgent()
    agent = mcp_tools.McpAgent(inner, backend, mcp_tools.McpConfig(**config))
    runner = episode_lib.EpisodeRunner(
      agent,
      admin,
      model_name="policy",
      permits=1,
      deadline_seconds=60.0,
      temperature=1.0,
    )
    task = types.Task("mcp/train/0", "mcp", 0, {})
    attempt = episode_lib.Attempt("e", task, 0, 1, 2000)
    episode = await runner.run(attempt, lambda task: environment)
    await inner.aclose()
    await admin.aclose()
    shown = [
      gateway.tokenizer.decode(list(r.prompt_ids)) for r in gateway.requests
    ]
  results = [m["content"] for m in episode.messages if m["role"] == "tool"]
  return episode, results, shown


async def test_tools_are_listed_and_called_and_files_come_out(backend):
  replies = [
    "\n".join(
      [
        call("add", a=2, b=3),
        call("note", text="first"),
        call("fail"),
        call("add", a="two", b=3),
        call("fly"),
        call("shout"),
      ]
    ),
    call("note", text="second"),
    "Done.",
  ]
  environment = Notes()
  episode, results, shown = await play(replies, backend, environment)
  assert (episode.error, episode.perf) == (None, 1.0)
  assert results[:2] == ["5", "0"]
  assert results[2].startswith("error: ") and "no luck" in results[2]
  assert results[3].startswith("error: ") and "integer" in results[3]
  assert results[4] == "error: there is no tool 'fly'"
  assert results[5] == "a" * 4000
  assert results[6] == "1"  # the server is the same one
  assert '"description": "Adds two numbers."' in shown[0]
  assert environment.left == {
    "old.txt": b"old",
    "note1.txt": b"first",
    "note2.txt": b"second",
  }


async def test_tools_stand_beside_the_environments(backend):
  replies = ["\n".join([call("one"), call("a__add", a=1, b=4)]), "5"]
  servers = desk("a"), desk("b")
  episode, results, shown = await play(replies, backend, Sums(), *servers)
  assert (episode.error, episode.perf) == (None, 1.0)
  assert results == ["1", "5"]
  for name in ("one", "a__note", "b__note"):
    assert f'"name": "{name}"' in shown[0]


async def test_a_server_that_hangs_or_ends_is_a_result(backend):
  replies = [call("sleep", seconds=60), call("leave"), call("add"), "Done."]
  episode, results, _ = await play(replies, backend, Notes(), call_seconds=0.5)
  assert episode.error is None
  assert "timed out" in results[0].lower()
  assert all(result.startswith("error: ") for result in results)
  assert episode.completions


BAD = {
  "it ends": (("sh", "-c", "echo no luck >&2; exit 3"), "no luck"),
  "it is not there": (("absent",), "absent"),
  "it says nothing": (("sleep", "60"), "TimeoutError"),
  "it makes no sense": (("yes",), "MCP servers: "),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_server_that_does_not_start_fails_the_episode(name):
  command, words = BAD[name]
  backend = unsafe.UnsafeProcess()
  environment = Notes()
  episode, _, _ = await play(
    [], backend, environment, desk(command=command), start_seconds=1.0
  )
  assert episode.status == types.EpisodeStatus.FAILED
  assert episode.error.startswith("AgentError: MCP servers: ")
  assert words in episode.error


async def test_files_count_when_the_model_fails(backend):
  environment = Notes()
  episode, _, _ = await play([call("note", text="x")], backend, environment)
  assert episode.status == types.EpisodeStatus.FAILED  # the script has ended
  assert episode.perf == 1.0 and environment.left["note1.txt"] == b"x"


async def test_who_does_not_know_the_token_is_hung_up():
  async with mcp_link.Listener() as listener:
    port = int(listener.origin.rpartition(":")[2])
    running = asyncio.get_running_loop().create_future()
    for line in (
      b"guess 0\n",
      b"\xff\n",
      b"\n",
      f"{listener.token} x\n".encode(),
    ):
      reader, writer = await asyncio.open_connection("127.0.0.1", port)
      writer.write(line)
      assert await reader.read() == b""
      writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{listener.token} 0\n".encode())
    _, link = await listener.link(0, running)
    link.write(b"hello\n")
    assert await reader.readline() == b"hello\n"
    again, other = await asyncio.open_connection("127.0.0.1", port)
    other.write(f"{listener.token} 0\n".encode())
    assert await again.read() == b""
    for one in (writer, other):
      one.close()


def test_servers_have_names_of_their_own(monkeypatch):
  with pytest.raises(errors.ConfigError, match="at least one"):
    mcp_tools.McpConfig()
  with pytest.raises(errors.ConfigError, match="of its own"):
    mcp_tools.McpConfig(servers=(desk(), desk()))
  monkeypatch.setitem(sys.modules, "mcp", None)
  with pytest.raises(errors.ConfigError, match=r"forge-jax\[mcp\]"):
    mcp_tools.McpAgent(None, None, mcp_tools.McpConfig(servers=(desk(),)))
