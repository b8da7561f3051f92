"""An agent with sub-agents: the real gateway, and a model that is a function."""

import asyncio
import json
import re

import pytest

from forge_jax import errors, types
from forge_jax.agents import orchestrator, react, toolbox, workspace
from forge_jax.agents.sandbox import unsafe
from forge_jax.gateway import client, scripted
from forge_jax.rollout import episode as episode_lib
from forge_jax.trainer import credit

LOOK_UP = {
  "type": "function",
  "function": {"name": "look_up", "parameters": {"type": "object"}},
}
PRICES = {"tea": "3", "milk": "4", "salt": "5"}
MAIN, SUB_AGENT = types.RequestKind.MAIN, types.RequestKind.SUB_AGENT


class Prices:
  """Asks for a sum; a tool that takes its time knows the parts."""

  tools = (LOOK_UP,)

  def __init__(self, together=1):
    self.together = asyncio.Barrier(together)  # look-ups at the same time
    self.running = self.most_running = 0
    self.answer = None

  def reset(self):
    return [{"role": "user", "content": "Sum the prices: tea, milk, salt."}]

  async def respond(self, reply):
    calls = reply.get("tool_calls")
    if not calls:
      self.answer = reply["content"]
      return None
    self.running += 1
    self.most_running = max(self.running, self.most_running)
    async with asyncio.timeout(20):
      async with self.together:
        pass
    self.running -= 1
    return [
      {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": PRICES[json.loads(call["function"]["arguments"])["what"]],
      }
      for call in calls
    ]

  def rewards(self):
    value = float(self.answer == "12")
    return [types.Reward("sum", types.Component.PERF, value)]


def call(name, **arguments):
  written = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{written}\n</tool_call>"


def policy(tokenizer_of, main=None):
  """Delegates each price, looks it up as a helper, adds up the reports."""
  main = main or "\n".join(
    call("delegate", task=f"Find the price: {what}") for what in PRICES
  )

  def reply(request):
    prompt = tokenizer_of().decode(list(request.prompt_ids))
    results = re.findall(r"<tool_response>\n(.*?)\n</tool_response>", prompt)
    if found := re.search(r"Find the price: (\w+)<", prompt):
      return results[0] if results else call("look_up", what=found[1])
    if not results:
      return main
    return str(sum(int(r) for r in results if r.isdecimal()))

  return reply


async def play(
  reply,
  environment,
  *,
  wrap=lambda agent: agent,
  sub_turns=4,
  deadline=60.0,
  **config,
):
  """One episode of an orchestrator; `reply` is made from the tokenizer."""
  with scripted.serve(reply(lambda: gateway.tokenizer)) as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    main = react.ReactAgent(react.ReactConfig(max_turns=4))
    sub = react.ReactAgent(react.ReactConfig(max_turns=sub_turns))
    agent = orchestrator.Orchestrator(
      main, sub, orchestrator.OrchestratorConfig(**config)
    )
    runner = episode_lib.EpisodeRunner(
      wrap(agent),
      admin,
      model_name="policy",
      permits=1,
      deadline_seconds=deadline,
      temperature=1.0,
    )
    task = types.Task("prices/train/0", "prices", 0, {})
    attempt = episode_lib.Attempt("e", task, 0, 1, 2000)
    episode = await runner.run(attempt, lambda task: environment)
    for agent in (main, sub):
      await agent.aclose()
    await admin.aclose()
  return episode


def kinds(episode):
  return [c.request.kind for c in episode.completions]


async def test_sub_agents_work_at_the_same_time_in_one_forest():
  environment = Prices(together=3)  # fewer at once would wait for ever
  episode = await play(policy, environment)
  assert (episode.error, episode.perf) == (None, 1.0)
  assert kinds(episode) == [MAIN, *[SUB_AGENT] * 6, MAIN]
  roots = [c for c in episode.completions if c.parent is None]
  assert len(roots) == 4  # the main conversation, and three of their own
  assert all(c.fork_reason is None for c in episode.completions)
  assert episode.completions[-1].parent == episode.completions[0].id
  names = [
    c.request.client_ids.get("x-forge-sub-agent") for c in episode.completions
  ]
  assert sorted(filter(None, names)) == sorted(
    f"sub-agent {n}" for n in (1, 2, 3) for _ in range(2)
  )
  # Reports come in the order of the calls, transcripts follow.
  results = [m["content"] for m in episode.messages if m["role"] == "tool"]
  assert results == ["3", "4", "5"]
  helpers = [m for m in episode.messages if m["role"] == "sub-agent"]
  assert [m["content"] for m in helpers] == ["3", "4", "5"]
  assert [m["role"] for m in helpers[0]["messages"]] == [
    *("system", "user", "assistant", "tool", "assistant"),
  ]


async def test_few_sub_agents_run_at_once_and_not_too_many_at_all():
  environment = Prices()
  episode = await play(policy, environment, parallel=1, most=2)
  assert environment.most_running == 1
  results = [m["content"] for m in episode.messages if m["role"] == "tool"]
  assert results == ["3", "4", "error: there are no more than 2 helpers"]
  assert kinds(episode).count(SUB_AGENT) == 4


async def test_calls_of_a_reply_are_answered_in_their_order():
  main = "\n".join(
    [
      call("look_up", what="salt"),
      call("delegate", task="Find the price: tea"),
      call("delegate", tusk="what?"),
      call("look_up", what="milk"),
    ]
  )
  episode = await play(lambda t: policy(t, main), Prices())
  results = [m["content"] for m in episode.messages if m["role"] == "tool"]
  assert results == ["5", "3", 'error: expected {"task": a text}', "4"]
  assert episode.perf == 1.0


async def test_a_sub_agent_that_fails_or_does_not_end_is_a_result():
  def refusing(tokenizer_of):
    inner = policy(tokenizer_of)

    def reply(request):
      if "price: milk<" in tokenizer_of().decode(list(request.prompt_ids)):
        raise errors.EngineError("no milk today")
      return inner(request)

    return reply

  episode = await play(refusing, Prices())
  results = [m["content"] for m in episode.messages if m["role"] == "tool"]
  assert results[0] == "3" and results[2] == "5"
  assert results[1].startswith("error: the helper failed: ")
  assert (episode.error, episode.perf) == (None, 0.0)
  episode = await play(policy, Prices(), sub_turns=1)
  results = [m["content"] for m in episode.messages if m["role"] == "tool"]
  assert results == ["error: the helper came to no end"] * 3


async def test_what_fails_otherwise_fails_the_episode_and_leaves_none_running():
  class Broken(Prices):
    async def respond(self, reply):
      raise KeyError("shelf")

  episode = await play(policy, Broken())
  assert episode.status == types.EpisodeStatus.FAILED
  assert episode.error == "KeyError: 'shelf'"
  assert kinds(episode)[0] == MAIN
  episode = await play(policy, Prices(together=9), deadline=2.0)
  assert episode.status == types.EpisodeStatus.TIMED_OUT
  assert kinds(episode) == [MAIN, *[SUB_AGENT] * 3]


async def test_a_sub_agents_last_call_ends_it():
  class Once(Prices):
    async def respond(self, reply):
      return None if reply.get("tool_calls") else await super().respond(reply)

  episode = await play(policy, Once(), parallel=1, most=1)
  assert kinds(episode) == [MAIN, SUB_AGENT, MAIN]


async def test_all_work_in_one_sandbox():
  main = "\n".join(call("delegate", task=f"Write file {n}") for n in ("a", "b"))

  def writing(tokenizer_of):
    def reply(request):
      prompt = tokenizer_of().decode(list(request.prompt_ids))
      if "<tool_response>" in prompt:
        return "done"
      if found := re.search("Write file ([ab])<", prompt):
        return call("bash", command=f"echo {found[1]} >{found[1]}.txt")
      return main

    return reply

  class Files(Prices):
    left = None

    def files(self):
      return {}

    def collect(self, files):
      self.left = files

  environment = Files()
  episode = await play(
    writing,
    environment,
    wrap=lambda agent: workspace.WorkspaceAgent(
      agent,
      unsafe.UnsafeProcess(),
      workspace.WorkspaceConfig(toolbox.ToolboxConfig()),
    ),
  )
  assert episode.error is None
  assert environment.left == {"a.txt": b"a\n", "b.txt": b"b\n"}


async def test_the_credit_of_sub_agents_is_a_share_of_the_episodes():
  won = await play(policy, Prices())
  lost = await play(lambda t: policy(t, "I give up."), Prices())
  group = types.Group(index=0, task=won.task, episodes=(won, lost))
  for share in (1.0, 0.25, 0.0):
    config = credit.CreditConfig(sub_agent_share=share, gamma=0.5)
    samples, stats = credit.assign_credit([group], config)
    got = {s.name: float(s.advantages[0]) for s in samples}
    # Returns: 1/2 at the start, as two steps of the main agent, then 1; the
    # baselines are half of that.
    expected = {"e/0": 0.25, "e/7": 0.5}
    expected |= {f"e/{n}": share * 0.5 for n in range(1, 7) if share}
    assert stats.response_tokens == sum(
      len(c.response_ids) for e in (won, lost) for c in e.completions
    )
    lost_sample = samples.pop()
    assert float(lost_sample.advantages[0]) == pytest.approx(-0.25)
    assert {s.name: float(s.advantages[0]) for s in samples} == pytest.approx(
      expected
    ), got


def test_numbers_that_cannot_work_are_refused():
  with pytest.raises(errors.ConfigError, match="parallel is 0 and most 16"):
    orchestrator.OrchestratorConfig(parallel=0)
  with pytest.raises(errors.ConfigError, match="sub_agent_share="):
    credit.CreditConfig(sub_agent_share=1.5)
