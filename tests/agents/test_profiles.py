"""Agents as they are published, in sandboxes, by their profiles.

They live in .agents, which `make test` makes. Those that are not there are
tried by hand; docs/black_box_agents.md says which and when.
"""

import json
import os
import pathlib
import shutil

import pytest

from forge_jax import client, errors
from forge_jax.agents import base, black_box, profiles
from forge_jax.agents.sandbox import bubblewrap
from forge_jax.gateway import scripted

AGENTS = (pathlib.Path(__file__).parents[2] / ".agents").resolve()
TASK = "Change hello to goodbye in greeting.txt"


class Greeting:
  """A file to be changed."""

  tools = ()
  left = None

  def reset(self):
    return [{"role": "user", "content": TASK}]

  def files(self):
    return {"greeting.txt": b"hello world\n"}

  def collect(self, files):
    self.left = files


def call(name, **arguments):
  written = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{written}\n</tool_call>"


EDIT = {"oldText": "hello", "newText": "goodbye"}
SCRIPTS = {
  "pi": [
    "I look first.\n" + call("read", path="greeting.txt"),
    call("edit", path="greeting.txt", edits=[EDIT]),
    "Done: it says goodbye.",
  ],
  "mini-swe-agent": [
    "I look first.\n" + call("bash", command="cat greeting.txt"),
    call("bash", command="sed -i s/hello/goodbye/ greeting.txt"),
    call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"),
  ],
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_it_works_in_a_sandbox(name):
  if not (AGENTS / ".installed").exists():
    pytest.skip("there is no .agents: `make .agents/.installed` makes it")
  folders = (AGENTS / "bin", AGENTS / "node_modules" / ".bin")
  if not any(
    shutil.which(profiles.KNOWN[name].command[0], path=f) for f in folders
  ):
    pytest.skip("npm was not there to install it")
  try:
    backend = bubblewrap.Bubblewrap(
      bubblewrap.BubblewrapConfig(
        show=(str(AGENTS),), path=tuple(map(str, folders))
      )
    )
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))
  environment = Greeting()
  agent = black_box.BlackBoxAgent(profiles.KNOWN[name], backend)
  with (
    scripted.serve(SCRIPTS[name]) as gateway,
    client.open_session(gateway.url, gateway.admin_token, "s") as session,
  ):
    endpoint = base.Endpoint(session.base_url, session.api_key, "policy", 512)
    messages = await agent.run(environment, endpoint)
  assert environment.left["greeting.txt"] == b"goodbye world\n"
  assert len(session.completions) == 3
  assert [c.parent is None for c in session.completions] == [True, False, False]
  assert messages[0]["content"] == TASK


@pytest.mark.parametrize("name", profiles.KNOWN)
def test_a_profile_says_how_it_is_installed(name):
  profile = profiles.KNOWN[name]
  assert profile.name == name
  assert name == "verifiers" or "{prompt}" in profile.command
  assert name == "truncate-bc" or "BubblewrapConfig(show=" in profile.install
