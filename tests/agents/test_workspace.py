"""White-box agents whose tools act in a sandbox."""

import json
import os

import pytest

from forge_jax import errors, types
from forge_jax.agents import react, toolbox, workspace
from forge_jax.agents.sandbox import bubblewrap, unsafe
from forge_jax.gateway import client, scripted
from forge_jax.rollout import episode as episode_lib

BROKEN = b"def double(n):\n  return n + n + 1\n"
TESTS = b"""import unittest
import double
class T(unittest.TestCase):
  def test(self): self.assertEqual(double.double(4), 8)
"""


class Fix:
  """A function that is wrong, and its tests."""

  tools = ()
  left = None

  def reset(self):
    return [{"role": "user", "content": "Make the tests pass."}]

  def files(self):
    return {"double.py": BROKEN, "test_double.py": TESTS}

  def collect(self, files):
    self.left = files

  def rewards(self):
    done = b"n + n\n" in (self.left or {}).get("double.py", b"")
    return [types.Reward("fixed", types.Component.PERF, float(done))]


@pytest.fixture(params=["bubblewrap", "unsafe"])
def backend(request):
  if request.param == "unsafe":
    return unsafe.UnsafeProcess()
  try:
    return bubblewrap.Bubblewrap()
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))


def call(name, **arguments):
  written = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{written}\n</tool_call>"


async def play(replies, backend, environment, tools, max_turns=8):
  config = workspace.WorkspaceConfig(toolbox.ToolboxConfig(tools=tools))
  with scripted.serve(replies) as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    inner = react.ReactAgent(react.ReactConfig(max_turns=max_turns))
    runner = episode_lib.EpisodeRunner(
      workspace.WorkspaceAgent(inner, backend, config),
      admin,
      model_name="policy",
      permits=1,
      deadline_seconds=60.0,
      temperature=1.0,
    )
    task = types.Task("fix/train/0", "fix", 0, {})
    attempt = episode_lib.Attempt("e", task, 0, 1, 2000)
    episode = await runner.run(attempt, lambda task: environment)
    await inner.aclose()
    await admin.aclose()
  return episode, [
    m["content"] for m in episode.messages if m["role"] == "tool"
  ]


async def test_a_code_agent_edits_until_the_tests_pass(backend):
  replies = [
    call("run_tests") + "\n" + call("read_file", path="double.py"),
    call("edit_file", path="double.py", old="n + n + 1", new="n + n"),
    call("run_tests"),
    "Fixed.",
  ]
  episode, results = await play(replies, backend, Fix(), toolbox.CODE)
  assert (episode.error, episode.perf) == (None, 1.0)
  assert "9 != 8" in results[0] and "[exit status 1]" in results[0]
  assert results[1].encode() == BROKEN
  assert results[2] == "edited"
  assert "OK" in results[3] and "exit status" not in results[3]
  assert [c.parent is None for c in episode.completions] == [
    True,
    False,
    False,
    False,
  ]


async def test_a_terminal_agent_has_a_shell(backend):
  replies = [
    call("bash", command="sed -i 's/ + 1//' double.py; ls"),
    call("bash", command="exit 7"),
    "Done.",
  ]
  environment = Fix()
  episode, results = await play(replies, backend, environment, toolbox.TERMINAL)
  assert (episode.error, episode.perf) == (None, 1.0)
  assert results == ["double.py\ntest_double.py\n", "[exit status 7]"]


async def test_whatever_is_called_there_is_an_answer(backend):
  replies = [
    "\n".join(
      [
        call("fly", to="the moon"),
        call("read_file", file="double.py"),
        call("read_file", path="nowhere.py"),
        call("edit_file", path="double.py", old="n", new="m"),
        call("edit_file", path="double.py", old="", new="m"),
        call("write_file", path="/usr/x", content="x"),
        call("write_file", path="new/dir/a.txt", content="ä\n"),
        call("read_file", path="new/dir/a.txt"),
      ]
    ),
    "I give up.",
  ]
  if isinstance(backend, unsafe.UnsafeProcess):
    replies[0] = replies[0].replace("/usr/x", "/proc/x")
  environment = Fix()
  episode, results = await play(replies, backend, environment, toolbox.CODE)
  assert (episode.error, episode.perf) == (None, 0.0)
  assert results[0] == "error: there is no tool 'fly'"
  assert results[1] == "error: expected the arguments path"
  assert "No such file" in results[2] and results[2].endswith("[exit status 1]")
  assert results[3] == "error: the text is 4 times in double.py; expected once"
  assert results[4] == "error: the text is 0 times in double.py; expected once"
  assert "exit status" in results[5]
  assert results[6:] == ["written", "ä\n"]
  assert environment.left["new/dir/a.txt"] == "ä\n".encode()


async def test_files_count_when_the_model_fails(backend):
  replies = [call("bash", command="sed -i 's/ + 1//' double.py")]
  episode, _ = await play(replies, backend, Fix(), toolbox.TERMINAL)
  assert (
    episode.status == types.EpisodeStatus.FAILED
  )  # the script is at its end
  assert episode.perf == 1.0


def test_an_unknown_tool_is_refused():
  with pytest.raises(errors.ConfigError, match="'fly'; expected of bash"):
    toolbox.ToolboxConfig(tools=("fly",))
