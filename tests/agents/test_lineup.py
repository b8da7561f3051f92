"""Agents as a configuration has them, against a real gateway."""

import contextlib
import dataclasses

import pytest

from forge_jax import errors
from forge_jax.agents import base, context, lineup, react, toolbox
from forge_jax.agents.sandbox import backends, unsafe
from forge_jax.gateway import client, scripted

LOOK = {
  "type": "function",
  "function": {
    "name": "look",
    "description": "Looks.",
    "parameters": {
      "type": "object",
      "properties": {"what": {"type": "string"}},
      "required": ["what"],
    },
  },
}


class Looking:
  """Ends with the first reply that calls nothing."""

  tools = (LOOK,)

  def __init__(self):
    self.called = []

  def reset(self):
    return [{"role": "user", "content": "Look at the door."}]

  def respond(self, reply):
    calls = reply.get("tool_calls") or []
    self.called += [call["function"]["name"] for call in calls]
    return [
      {"role": "tool", "tool_call_id": call["id"], "content": "It is shut."}
      for call in calls
    ] or None

  def rewards(self):
    return ()


def made(strategy="none", **config):
  """The line-up of a configuration."""
  return lineup.Lineup(
    lineup.LineupConfig(**config),
    react.ReactConfig(),
    context.ContextConfig(strategy=strategy),
    backends.SandboxConfig("unsafe", ready=1),
    toolbox.ToolboxConfig(),
    seed=0,
  )


async def play(replies, **config):
  """One episode; returns what was called, and the prompts."""
  environment = Looking()
  with scripted.serve(replies) as gateway:
    async with contextlib.AsyncExitStack() as closing:
      admin = client.GatewayClient(gateway.url, gateway.admin_token)
      closing.push_async_callback(admin.aclose)
      keys = await admin.open_session("s", seed=0)
      endpoint = base.Endpoint(
        keys.base_url, keys.api_key, model="policy", max_tokens=2000
      )
      agent = made(**config).make(closing, on_files=False)
      await agent.run(environment, endpoint)
    decode = gateway.tokenizer.decode
    prompts = [decode(list(r.prompt_ids)) for r in gateway.requests]
  return environment.called, prompts


async def test_one_with_nothing_besides_is_shown_the_task_as_it_is():
  called, (prompt,) = await play(["It is shut."])
  assert called == [] and '"name": "look"' in prompt
  assert "delegate" not in prompt


async def test_scaffolds_show_tools_in_their_own_way():
  _, (prompt,) = await play(["It is shut."], scaffolds=("xml",))
  assert "<call tool=" in prompt and '"type": "function"' not in prompt


async def test_helpers_have_turns_and_scaffolds_of_their_own():
  delegates = (
    '<tool_call>\n{"name": "delegate", "arguments": {"task": "Look."}}\n'
    "</tool_call>"
  )
  looks = (
    '<tool_call>\n{"name": "look", "arguments": {"what": "door"}}\n</tool_call>'
  )
  called, prompts = await play(
    [delegates, looks, "Done."], helpers=1, helper_turns=1
  )
  assert called == ["look"] and len(prompts) == 3
  assert "You help another agent" in prompts[1]
  assert "the helper came to no end" in prompts[2]


async def test_servers_have_their_command_from_the_configuration():
  made_of = made(mcp=("desk=python3 'my server.py' --fast", "lamp=lamp"))
  servers = made_of.config.servers().servers
  assert [(s.name, s.command) for s in servers] == [
    ("desk", ("python3", "my server.py", "--fast")),
    ("lamp", ("lamp",)),
  ]
  async with contextlib.AsyncExitStack() as closing:
    agent = made_of.make(closing, on_files=True)
    with pytest.raises(errors.AgentError, match="MCP servers"):
      await agent.run(Looking(), base.Endpoint("http://x/v1", "key", "m", 9))


async def test_sandboxes_wait_for_the_next_episode_and_for_no_other(
  monkeypatch,
):
  opened, real = [], unsafe.UnsafeProcess.open

  async def open_one(self, *args, **kwargs):
    opened.append(await real(self, *args, **kwargs))
    return opened[-1]

  monkeypatch.setattr(unsafe.UnsafeProcess, "open", open_one)
  ahead, own = made(), made()
  none = dataclasses.replace(own.sandbox, ready=0)
  own = dataclasses.replace(own, sandbox=none)
  for one, more in ((ahead, 1), (own, 0)):
    opened.clear()
    async with contextlib.AsyncExitStack() as closing:
      box = await one.sandboxes(closing).open()
      closing.push_async_callback(box.aclose)
      assert box is opened[0]
    assert len(opened) == 1 + more
    for box in opened:  # none is left
      with pytest.raises(errors.SandboxError, match="it is closed"):
        await box.get()


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"helpers": -1}, "helpers is -1"),
    ({"helpers": 2, "helpers_at_once": 0}, "parallel is 0"),
    ({"scaffolds": ("yaml",)}, "scaffold formats"),
    ({"mcp": ("python3 server.py",)}, "expected 'name=command'"),
    ({"mcp": ("a=b", "a=c")}, "a name of its own"),
    ({"mcp": ("a='b",)}, "expected 'name=command'"),
    ({"strategy": "truncate", "scaffolds": ("native", "xml")}, "has xml"),
  ],
)
def test_what_cannot_work_is_told_at_once(config, message):
  with pytest.raises(errors.ConfigError, match=message):
    made(**config)


def test_no_sandbox_waits_fewer_times_than_none():
  with pytest.raises(errors.ConfigError, match="ready is -1"):
    backends.SandboxConfig(ready=-1)
