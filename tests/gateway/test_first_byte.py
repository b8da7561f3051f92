"""A streamed reply begins when its first token exists, not when it ends."""

import asyncio

import aiohttp
import pytest

from forge_jax import types
from forge_jax.engine import api
from forge_jax.gateway import client as gateway_client
from forge_jax.gateway import scripted, server

_ASKED = [{"role": "user", "content": "?"}]


class GatedEngine:
  """Samples one token, and the others when it is told to."""

  max_context = 4096

  def __init__(self, ids):
    self._ids = tuple(ids)
    self.first = asyncio.Event()
    self.others = asyncio.Event()

  async def generate(self, request):
    await self.first.wait()
    yield self._chunk(self._ids[:1], None)
    await self.others.wait()
    yield self._chunk(self._ids[1:], types.StopReason.STOP)

  def abort(self, request_id):
    self.first.set()
    self.others.set()

  def _chunk(self, ids, reason):
    return api.TokenChunk(ids, (-1.0,) * len(ids), (0,) * len(ids), reason)


@pytest.mark.parametrize(
  ("path", "body"),
  [
    ("/v1/chat/completions", {"messages": _ASKED}),
    ("/v1/completions", {"prompt": "once"}),
    ("/v1/responses", {"input": "?"}),
    ("/v1/messages", {"messages": _ASKED, "max_tokens": 9}),
  ],
)
# A first token that is held back, as it may be the beginning of something else.
@pytest.mark.parametrize("text", ["Hello there", "<think>why</think>so", "  a"])
async def test_the_first_byte_is_sent_with_the_first_token(path, body, text):
  tokenizer = scripted.byte_tokenizer()
  ids = tokenizer.encode(text, add_special_tokens=False)
  engine = GatedEngine([*ids, tokenizer.eos_token_id])
  gateway = server.Gateway(engine, tokenizer)
  await gateway.start()
  admin = gateway_client.GatewayClient(gateway.url, gateway.admin_token)
  try:
    keys = await admin.open_session("s", seed=0)
    async with aiohttp.ClientSession() as http:
      asking = asyncio.create_task(
        http.post(
          gateway.url + path,
          json={"model": "m", "stream": True, **body},
          headers={"Authorization": f"Bearer {keys.api_key}"},
        )
      )
      await asyncio.sleep(0.02)
      assert not asking.done()  # a request may yet be refused by its status
      engine.first.set()
      async with asyncio.timeout(10):
        reply = await asking
        assert reply.status == 200
        if path != "/v1/completions" or text == "Hello there":
          assert await reply.content.readany()
      engine.others.set()
      rest = await reply.content.read()
      assert rest.endswith(b"\n\n")
  finally:
    await admin.aclose()
    await gateway.stop()
