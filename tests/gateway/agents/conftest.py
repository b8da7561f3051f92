"""Runs real agents, as processes of their own, against a scripted gateway.

The agents live in .agents, which `make test` makes from requirements.txt and
package-lock.json. They are as their authors published them and know only the
address and the key of a session.
"""

import asyncio
import json
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[3]
AGENTS = ROOT / ".agents"


class Stage:
  """A gateway with one open session, and a folder with a file to edit."""

  def __init__(self, harness, keys, folder):
    self.harness = harness
    self.keys = keys
    self.url = harness.gateway.url
    self.greeting = folder / "greeting.txt"
    self.greeting.write_text("hello world\n")
    self.home = folder.parent / "home"
    self.home.mkdir()
    self._folder = folder
    self._said = []

  def say(self, *replies):
    """What the model will sample, request by request."""
    self.harness.say(*replies)
    self._said = [*self.harness.replies]

  def answer(self, reply):
    """What the model will sample: `reply` of the text of each prompt."""
    self._said = said = []
    harness = self.harness

    class Answers:
      def pop(self, _):
        prompt = harness.text(harness.requests[-1].prompt_ids)
        said.append(harness.ids(reply(prompt)))
        return said[-1]

      def __bool__(self):
        return False  # there is none left that was not asked for

    harness.replies = Answers()

  async def run(self, *command, seconds=120, **variables):
    """Runs a command of .agents to its end; returns what it printed.

    It inherits no variables but the path: no proxy, no other key.
    """
    here = AGENTS / "bin", AGENTS / "node_modules" / ".bin"
    node = pathlib.Path(shutil.which("node") or "/usr/bin/node").parent
    process = await asyncio.create_subprocess_exec(
      *map(str, command),
      cwd=self._folder,
      env={
        "PATH": ":".join(map(str, (*here, node, "/usr/bin", "/bin"))),
        "HOME": str(self.home),
        "LANG": "C.UTF-8",
        **variables,
      },
      stdin=asyncio.subprocess.DEVNULL,
      stdout=asyncio.subprocess.PIPE,
      stderr=asyncio.subprocess.STDOUT,
    )
    try:
      async with asyncio.timeout(seconds):
        output, _ = await process.communicate()
    finally:
      if process.returncode is None:
        process.kill()
        await process.wait()
    text = output.decode(errors="replace")
    assert process.returncode == 0, text
    return text

  async def forest(self):
    """The completions as a list of (parent's number, mismatch).

    Also checks, token by token, that everything scripted was asked for and
    sampled, and that a prompt which goes on from another completion begins with
    the very ids of its prompt and of what was sampled there.
    """
    assert not self.harness.replies
    forest = await self.harness.admin.forest("s")
    nodes = {node["id"]: node for node in forest["nodes"]}
    prompts = {r.id: list(r.prompt_ids) for r in self.harness.requests}
    found = []
    for number, said in enumerate(self._said):
      prompt = nodes[f"s/{number}/prompt"]
      sampled = nodes[f"s/{number}"]
      # A stop string ends a reply before its last, the stop token.
      assert sampled["sampled"] and sampled["token_ids"] in (said, said[:-1])
      parent, ids = prompt["parent"], prompt["token_ids"]
      if parent is not None:
        ids = [*prompts[parent], *nodes[parent]["token_ids"], *ids]
      assert prompts[f"s/{number}"] == ids
      parent = None if parent is None else int(parent.removeprefix("s/"))
      found.append((parent, prompt["mismatch"]))
    assert len(nodes) == 2 * len(found)
    return found

  def prompt(self, number):
    """The text that the model saw in a request."""
    return self.harness.text(self.harness.requests[number].prompt_ids)


@pytest.fixture
async def stage(start, tool_tokenizer, tmp_path):
  if not (AGENTS / ".installed").exists():
    pytest.skip("there is no .agents: `make .agents/.installed` makes it")
  harness = await start(tool_tokenizer, max_context=2**18)
  folder = tmp_path / "work"
  folder.mkdir()
  return Stage(harness, await harness.open(), folder)


@pytest.fixture
def task():
  return "Change hello to goodbye in greeting.txt"


@pytest.fixture
def call():
  """Writes a tool call as the scripted model does."""

  def write(name, **arguments):
    written = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{written}\n</tool_call>"

  return write


@pytest.fixture
def programs():
  """The folder of the programs that run in .agents."""
  return pathlib.Path(__file__).parent / "programs"
