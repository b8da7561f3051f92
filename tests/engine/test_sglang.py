"""The client of SGLang's API: against our server, and recorded replies."""

import asyncio
import dataclasses
import json
import pathlib

from aiohttp import web
import engine_servers
from engine_servers import chunks, joined, request
import pytest

from forge_jax import errors, types
from forge_jax.engine import scripted, server, sglang

RECORDED = json.loads(
  (pathlib.Path(__file__).parent / "recorded/sglang_jax.json").read_text()
)["replies"]


async def until(condition):
  async with asyncio.timeout(20):
    while not condition():
      await asyncio.sleep(0.01)


class Recording:
  """A server that answers as sglang-jax was recorded to."""

  def __init__(self, **answers):
    self._answers = answers
    self.bodies = []

  async def __aenter__(self):
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", self._answer)
    self._runner = web.AppRunner(app)
    await self._runner.setup()
    await web.TCPSite(self._runner, "127.0.0.1", 0).start()
    port = self._runner.addresses[0][1]
    self.url = f"http://127.0.0.1:{port}"
    return self

  async def __aexit__(self, *_):
    await self._runner.cleanup()

  async def _answer(self, http):
    name = http.path.rpartition("/")[2]
    if name == "generate":
      self.bodies.append(await http.json())
    answer = self._answers.get(name, name)
    answer = answer.pop(0) if isinstance(answer, list) else answer
    if callable(answer):
      return await answer(http)
    if answer not in RECORDED:
      return web.json_response({"detail": "Not Found"}, status=404)
    recorded = RECORDED[answer]
    kind = "text/event-stream" if "stream" in answer else "application/json"
    return web.Response(
      text=recorded["body"], status=recorded["status"], content_type=kind
    )


async def connected(recording, **config):
  made = sglang.SGLangEngine(
    sglang.SGLangConfig(url=recording.url, patience=0.3, **config)
  )
  await made.connect()
  return made


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_sampled_is_what_the_engine_samples(stream):
  async with engine_servers.serving(stream=stream) as (engine, _, client):
    assert client.max_context == engine.max_context - 1
    asked = request("r", seed=9, max_tokens=4)
    direct = await chunks(engine, asked)
    found = await chunks(client, asked)
    for field in ("token_ids", "logprobs", "versions"):
      assert joined(found, field) == joined(direct, field)
    assert found[-1].stop_reason == types.StopReason.LENGTH


async def test_whose_turn_it_is_reaches_the_engine():
  seen = []
  engine = scripted.ScriptedEngine(
    lambda r: seen.append((r.session, r.priority)) or [1], max_context=256
  )
  async with engine_servers.serving(engine) as (_, _, client):
    asked = request("a")
    await chunks(client, asked)
    asked = dataclasses.replace(asked, id="b", session="s/1", priority=-3)
    await chunks(client, asked)
  assert seen == [("", 0), ("s/1", -3)]


async def test_chunks_arrive_as_they_are_sampled():
  slow = scripted.ScriptedEngine(
    engine_servers.scripted_reply, max_context=256, delay=0.01
  )
  async with engine_servers.serving(slow) as (_, _, client):
    found = await chunks(client, request("r", max_tokens=6))
  assert sum(len(chunk.token_ids) for chunk in found) == 6 < 2 * len(found)


async def test_stops_and_prompts_that_are_too_long():
  async with engine_servers.serving() as (_, _, client):
    found = await chunks(client, request("r", stop_token_ids=(5,)))
    assert found[-1].stop_reason == types.StopReason.STOP
    found = await chunks(client, request("r", stop_strings=("<4>",)))
    assert joined(found, "token_ids") == [3, 4]
    found = await chunks(client, request("r", [1] * 250, max_tokens=99))
    assert len(joined(found, "token_ids")) == 5
    with pytest.raises(errors.ContextOverflowError, match="255 tokens"):
      await chunks(client, request("r", [1] * 255))


async def test_refusals_keep_their_type_and_are_not_tried_again():
  async with engine_servers.serving() as (engine, _, client):

    async def refuse(asked):
      raise kind("no such thing")
      yield

    engine.generate = refuse
    for kind in (errors.GrammarError, errors.EngineError):
      with pytest.raises(kind, match=r"127\.0\.0\.1:\d+: no such thing"):
        await chunks(client, request("r"))
    assert client.stats()["retries"] == 0


async def test_an_abort_keeps_what_was_sampled_and_stops_the_engine():
  slow = scripted.ScriptedEngine(
    engine_servers.scripted_reply, max_context=256, delay=0.01
  )
  async with engine_servers.serving(slow) as (engine, _, client):
    found = []
    async for chunk in client.generate(request("r", max_tokens=200)):
      found.append(chunk)
      if len(found) == 3:
        client.abort("unknown")
        client.abort("r")
    assert found[-1].stop_reason == types.StopReason.ABORT
    assert joined(found, "token_ids")[:3] == [3, 4, 5]
    await until(lambda: engine.stats()["running"] == 0)
    # So does whoever stops to read.
    stream = client.generate(request("r", max_tokens=200))
    await anext(stream)
    await stream.aclose()
    await until(lambda: engine.stats()["running"] == 0)
    assert engine.stats()["tokens_sampled"] < 100


async def test_controls_reach_the_engine_and_are_confirmed():
  async with engine_servers.serving() as (engine, _, client):
    call = asyncio.to_thread
    await call(client.flush_cache)
    assert engine.stats()["flushes"] == 1
    await call(client.pause)
    task = asyncio.create_task(chunks(client, request("r")))
    await until(lambda: engine.stats()["running"] == 1)
    await call(
      client.update_weights, types.WeightsVersion(8, path="weights/v8")
    )
    await call(client.resume)
    assert joined(await task, "versions") == [8] * 5
    assert client.stats()["version"] == 8
    with pytest.raises(errors.EngineError, match="version 9 carry no path"):
      client.update_weights(types.WeightsVersion(9, params={}))


async def test_refused_weights_are_an_error_with_the_servers_reason():
  async with engine_servers.serving() as (engine, _, client):

    def refuse(weights):
      raise errors.EngineError("weights version 3 are refused: damaged")

    engine.update_weights = refuse
    weights = types.WeightsVersion(3, path="weights/v3")
    with pytest.raises(errors.EngineError, match="are refused: damaged"):
      await asyncio.to_thread(client.update_weights, weights)
    assert client.stats()["version"] == 0


async def test_a_control_that_hangs_ends_with_an_error():
  limits = {"control_seconds": 0.2}
  async with engine_servers.serving(**limits) as (engine, _, client):
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang(timeout):
      asyncio.run_coroutine_threadsafe(done.wait(), loop).result()

    engine.settle = hang
    weights = types.WeightsVersion(3, path="weights/v3")
    with pytest.raises(errors.EngineUnavailableError, match="Timeout"):
      await asyncio.to_thread(client.update_weights, weights)
    done.set()


async def test_a_server_that_comes_back_gets_the_request_again():
  engine = scripted.ScriptedEngine(
    engine_servers.scripted_reply, max_context=256
  )
  async with engine_servers.serving(engine) as (_, served, client):
    port = int(served.url.rpartition(":")[2])
    await served.stop()
    task = asyncio.create_task(chunks(client, request("r")))
    await until(lambda: client.stats()["retries"])
    again = server.EngineServer(engine, server.EngineServerConfig(port=port))
    await again.start()
    try:
      assert joined(await task, "token_ids") == [3, 4, 5, 6, 7]
    finally:
      await again.stop()


async def test_a_server_that_stays_away_is_an_error_in_time():
  async with engine_servers.serving(patience=0.3) as (_, served, client):
    await served.stop()
    with pytest.raises(errors.EngineUnavailableError, match="ClientConnector"):
      await chunks(client, request("r"))
  fresh = sglang.SGLangEngine(sglang.SGLangConfig(served.url, patience=0.1))
  with pytest.raises(errors.EngineUnavailableError):
    await fresh.connect()
  with pytest.raises(errors.EngineUnavailableError, match="not connected"):
    await chunks(fresh, request("r"))
  await fresh.aclose()


async def test_a_reply_that_breaks_off_fails_and_keeps_its_tokens():
  async def drop(http):
    response = web.StreamResponse()
    await response.prepare(http)
    event = json.dumps(
      {
        "output_ids": [3],
        "meta_info": {
          "finish_reason": None,
          "completion_tokens": 1,
          "output_token_logprobs": [[-0.5, 3, None]],
        },
      }
    )
    await response.write(f"data: {event}\n\n".encode())
    http.transport.close()
    return response

  async with Recording(generate=drop) as r:
    client, found = await connected(r, stream=True), []
    with pytest.raises(errors.EngineUnavailableError, match="generate"):
      async for chunk in client.generate(request("r")):
        found.append(chunk)
    assert joined(found, "token_ids") == [3] and len(r.bodies) == 1
    await client.aclose()


async def test_sglang_jax_as_recorded():
  async with Recording(generate="whole", flush_cache="flush_cache") as r:
    client = await connected(r)
    assert client.max_context == 511
    [chunk] = await chunks(client, request("r", temperature=0.0))
    assert chunk.token_ids == (37749, 14675, 39057, 11505, 25764)
    [body] = r.bodies
    assert body["return_logprob"] is True and body["stream"] is False
    assert body["sampling_params"]["temperature"] == 0.0
    await asyncio.to_thread(client.flush_cache)
    weights = types.WeightsVersion(3, path="weights/v3")
    with pytest.raises(errors.EngineError, match="no route /update_weights"):
      await asyncio.to_thread(client.update_weights, weights)
    await client.aclose()


async def test_sglang_jax_as_recorded_streams_when_told_to():
  async with Recording(generate="stream") as r:
    client = await connected(r, stream=True)
    found = await chunks(client, request("r"))
    assert joined(found, "token_ids") == [4607, 27232, 48750, 11901]
    assert r.bodies[0]["stream"] is True
    await client.aclose()
  async with Recording(generate=["long", "longstream"]) as r:
    for stream in (False, True):
      client = await connected(r, stream=stream)
      with pytest.raises(errors.EngineError, match="longer than the model's"):
        await chunks(client, request("r"))
      await client.aclose()


async def test_a_flush_waits_until_nothing_runs():
  async with Recording(flush_cache=["flush_busy", "flush_cache"]) as r:
    client = await connected(r)
    await asyncio.to_thread(client.flush_cache)
    await client.aclose()
  async with Recording(flush_cache="flush_busy") as r:
    client = await connected(r, control_seconds=0.3)
    with pytest.raises(errors.EngineError, match="pending requests"):
      await asyncio.to_thread(client.flush_cache)
    await client.aclose()


async def test_logprobs_from_before_a_filter_are_refused_or_accepted():
  async with Recording(generate="whole") as r:
    client = await connected(r)
    for name, value in (("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)):
      with pytest.raises(errors.EngineError, match=f"{name}=.*exact_logprobs"):
        await chunks(client, request("r", **{name: value}))
    await client.aclose()
    client = await connected(r, exact_logprobs=False)
    assert await chunks(client, request("r", top_p=0.9))
    assert r.bodies[0]["sampling_params"]["top_p"] == 0.9
    await client.aclose()
  async with engine_servers.serving() as (_, _, client):  # ours are exact
    assert await chunks(client, request("r", top_p=0.9))


async def test_something_else_is_told_from_a_server():
  async with Recording(models="get_model_info") as r:
    with pytest.raises(errors.EngineError, match="tells no max_model_len"):
      await connected(r)
  async with Recording(models="flush_cache") as r:
    with pytest.raises(errors.EngineError, match="not JSON"):
      await connected(r)
