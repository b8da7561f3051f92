"""The engine's server over loopback: routes, errors, who goes away."""

import asyncio
import json
import random

import aiohttp
import engine_servers
import pytest

from forge_jax import errors
from forge_jax.engine import scripted, server

PROMPT = {"input_ids": [1, 2, 3], "return_logprob": True}


class Browser:
  """Raw requests to a server."""

  def __init__(self, url, http, key=None):
    self._url, self._http = url, http
    self._headers = {"Authorization": f"Bearer {key}"} if key else {}

  async def __call__(self, method, path, body=None, data=None):
    async with self._http.request(
      method, self._url + path, json=body, data=data, headers=self._headers
    ) as response:
      text = await response.text()
      is_json = response.content_type == "application/json"
      return response.status, json.loads(text) if is_json else text

  async def generate(self, **body):
    return await self("POST", "/generate", PROMPT | body)

  async def events(self, **body):
    status, text = await self.generate(stream=True, **body)
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    return [json.loads(e[6:]) for e in text.split("\n\n")[:-2]]


class Serving:
  """A served scripted engine and a browser of it."""

  def __init__(self, **kwargs):
    self._kwargs = kwargs

  async def __aenter__(self):
    self._stack = engine_servers.serving(**self._kwargs)
    engine, served, _ = await self._stack.__aenter__()
    self._http = aiohttp.ClientSession()
    return engine, served, Browser(served.url, self._http)

  async def __aexit__(self, *exc):
    await self._http.close()
    await self._stack.__aexit__(*exc)


def engine(**kwargs):
  return scripted.ScriptedEngine(
    engine_servers.scripted_reply, max_context=256, **kwargs
  )


async def until(condition):
  async with asyncio.timeout(20):
    while not condition():
      await asyncio.sleep(0.01)


async def test_a_reply_has_ids_logprobs_and_versions():
  async with Serving() as (_, _, browser):
    status, reply = await browser.generate(
      rid="r", sampling_params={"max_new_tokens": 3, "sampling_seed": 2}
    )
  assert status == 200 and reply["output_ids"] == [3, 4, 5]
  meta = reply["meta_info"]
  assert meta["id"] == "r" and meta["prompt_tokens"] == 3
  assert meta["finish_reason"] == {"type": "length", "length": 3}
  assert meta["output_token_logprobs"] == [
    [scripted.scripted_logprob(2, n, 3 + n), 3 + n, None] for n in range(3)
  ]
  assert meta["weight_version"] == "0" and meta["weight_versions"] == [0] * 3


async def test_logprobs_are_told_when_asked_for_only():
  async with Serving() as (_, _, browser):
    _, reply = await browser.generate(return_logprob=False)
  assert "output_token_logprobs" not in reply["meta_info"]


async def test_a_batch_is_answered_in_its_order():
  async with Serving() as (_, _, browser):
    _, replies = await browser.generate(
      input_ids=[[1], [1, 2]], sampling_params={"max_new_tokens": 2, "n": 2}
    )
    events = await browser.events(
      input_ids=[[1], [1, 2]], sampling_params={"max_new_tokens": 2}
    )
  assert [r["output_ids"] for r in replies] == [[1, 2], [1, 2], [2, 3], [2, 3]]
  by_index = {event["index"]: event["output_ids"] for event in events}
  assert by_index == {0: [1, 2], 1: [2, 3]}


async def test_a_stream_has_new_tokens_only():
  async with Serving(engine=engine(delay=0.001)) as (_, _, browser):
    events = await browser.events(sampling_params={"max_new_tokens": 3})
  assert [e["output_ids"] for e in events] == [[3], [4], [5]]
  metas = [e["meta_info"] for e in events]
  assert [m["completion_tokens"] for m in metas] == [1, 2, 3]
  assert [bool(m["finish_reason"]) for m in metas] == [False, False, True]


async def test_a_stop_token_and_the_end_of_sequence_end_a_reply():
  async with Serving(eos=(6,)) as (_, _, browser):
    _, reply = await browser.generate(sampling_params={"stop_token_ids": [5]})
    _, other = await browser.generate()
    _, none = await browser.generate(
      sampling_params={"ignore_eos": True, "max_new_tokens": 9}
    )
  assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": 5}
  assert other["output_ids"] == [3, 4, 5, 6]
  assert len(none["output_ids"]) == 9


@pytest.mark.parametrize(
  ("method", "path", "body", "status", "message"),
  [
    ("POST", "/generate", {"input_ids": []}, 400, "input_ids"),
    ("POST", "/generate", {"input_ids": [1] * 256}, 400, "256 tokens"),
    ("POST", "/generate", [], 400, "a JSON object"),
    ("GET", "/generate", None, 405, "Method Not Allowed"),
    ("GET", "/nothing", None, 404, "Not Found"),
    ("POST", "/abort_request", {}, 400, "a rid, or abort_all"),
    ("POST", "/pause_generation", {"mode": "retract"}, 400, "'retract'"),
    ("POST", "/update_weights_from_disk", {}, 400, "model_path"),
    (
      "POST",
      "/update_weights_from_disk",
      {"model_path": "x", "weight_version": "new"},
      400,
      "weight_version, a number",
    ),
  ],
)
async def test_bad_requests_get_typed_errors(
  method, path, body, status, message
):
  async with Serving() as (_, _, browser):
    found, reply = await browser(method, path, body)
    assert found == status == reply["error"]["code"]
    assert message in reply["error"]["message"]
    assert reply["error"]["type"] in ("EngineError", "ContextOverflowError")
    status, reply = await browser("POST", "/generate", data=b"{nonsense")
    assert status == 400 and "not JSON" in reply["error"]["message"]
    assert (await browser.generate())[0] == 200


async def test_a_models_exception_is_an_answer_and_the_server_lives():
  made = engine()
  sane = made.generate

  async def explode(request):
    if request.prompt_ids[0] == 13:
      raise RuntimeError("device on fire")
    async for chunk in sane(request):
      yield chunk
      if request.prompt_ids[0] == 14:
        raise errors.EngineUnavailableError("the engine failed: on fire")

  made.generate = explode
  async with Serving(engine=made) as (_, _, browser):
    status, reply = await browser.generate(input_ids=[13])
    assert status == 500 and reply["error"]["type"] == "InternalError"
    assert "on fire" not in reply["error"]["message"]  # its log says it
    status, reply = await browser.generate(input_ids=[14])
    assert status == 503
    assert reply["error"]["type"] == "EngineUnavailableError"
    events = await browser.events(input_ids=[14])
    assert "output_ids" in events[0]
    assert events[-1]["error"]["code"] == 503
    # One of a batch that fails takes the others with it, and no more.
    status, _ = await browser.generate(input_ids=[[13], [1]])
    assert status == 500
    assert (await browser.generate())[0] == 200


async def test_a_rid_in_flight_is_refused():
  async with Serving(engine=engine(delay=0.02)) as (made, _, browser):
    first = asyncio.create_task(browser.generate(rid="same"))
    await until(lambda: made.stats()["running"] == 1)
    status, reply = await browser.generate(rid="same")
    assert status == 400 and "'same' is in flight" in reply["error"]["message"]
    assert (await first)[0] == 200


async def test_an_abort_ends_a_request_and_keeps_what_was_sampled():
  async with Serving(engine=engine(delay=0.01)) as (made, _, browser):
    one, two = (
      asyncio.create_task(
        browser.generate(rid=rid, sampling_params={"max_new_tokens": 200})
      )
      for rid in ("one", "two")
    )
    await until(lambda: made.stats()["tokens_sampled"] > 6)
    await browser("POST", "/abort_request", {"rid": "unknown"})
    assert (await browser("POST", "/abort_request", {"rid": "one"}))[0] == 200
    _, reply = await one
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert reply["output_ids"][:2] == [3, 4] and not two.done()
    await browser("POST", "/abort_request", {"abort_all": True})
    _, reply = await two
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_aborts(stream):
  async with Serving(engine=engine(delay=0.01)) as (made, _, browser):
    body = {"sampling_params": {"max_new_tokens": 200}, "stream": stream}
    task = asyncio.create_task(browser.generate(**body))
    await until(lambda: made.stats()["tokens_sampled"] > 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: made.stats()["running"] == 0)
    assert made.stats()["tokens_sampled"] < 150


async def test_a_pause_holds_requests_and_abort_mode_ends_them():
  async with Serving(engine=engine(delay=0.001)) as (made, _, browser):
    await browser("POST", "/pause_generation", {"mode": "in_place"})
    task = asyncio.create_task(browser.generate())
    await until(lambda: made.stats()["running"] == 1)
    await asyncio.sleep(0.05)
    assert made.stats()["tokens_sampled"] == 0
    assert (await browser("POST", "/continue_generation", {}))[0] == 200
    assert len((await task)[1]["output_ids"]) == 128
    task = asyncio.create_task(browser.generate())
    await until(lambda: made.stats()["running"] == 1)
    await browser("POST", "/pause_generation", {})
    assert (await task)[1]["meta_info"]["finish_reason"]["type"] == "abort"


async def test_controls_and_information():
  async with Serving() as (made, _, browser):
    assert (await browser("GET", "/flush_cache"))[0] == 200
    assert (await browser("POST", "/flush_cache"))[0] == 200
    assert made.stats()["flushes"] == 2
    status, reply = await browser(
      "POST",
      "/update_weights_from_disk",
      {"model_path": "weights/v4", "weight_version": "4"},
    )
    assert status == 200 and reply["success"]
    for path in ("/get_server_info", "/server_info"):
      _, info = await browser("GET", path)
      assert info["weight_version"] == "4" and info["context_length"] == 256
    for path in ("/get_model_info", "/model_info", "/get_weight_version"):
      _, info = await browser("GET", path)
      assert info["weight_version"] == "4"
    _, models = await browser("GET", "/v1/models")
    assert models["data"][0]["max_model_len"] == 256
    for path in ("/health", "/health_generate"):
      assert await browser("GET", path) == (200, {"status": "ok"})


async def test_an_engine_that_hangs_is_unhealthy():
  config = server.EngineServerConfig(health_seconds=0.05, settle_seconds=0.05)
  made = engine()
  async with Serving(engine=made, config=config) as (_, _, browser):
    made.pause()
    status, reply = await browser("GET", "/health_generate")
    assert status == 503 and "no token in 0.05 s" in reply["error"]["message"]
    made.resume()

    def stuck(timeout):
      raise errors.EngineUnavailableError(f"no step in {timeout:g} s")

    made.settle = stuck
    assert (await browser("GET", "/health"))[0] == 503
    status, reply = await browser("POST", "/flush_cache")
    assert status == 503 and reply["success"] is False


async def test_metrics_have_the_engines_figures():
  async with Serving() as (_, _, browser):
    await browser.generate()
    await browser.generate(input_ids=[])
    _, text = await browser("GET", "/metrics")
  assert "forge_engine_tokens_sampled 128.0" in text
  assert 'forge_engine_completions_total{stop_reason="length"} 1.0' in text
  assert (
    'forge_engine_requests_total{route="/generate",status="400"} 1.0' in text
  )
  assert "forge_engine_first_token_seconds_count 1.0" in text


async def test_a_key_is_wanted_on_every_route_but_the_health_checks():
  config = server.EngineServerConfig(api_key="secret")
  served = server.EngineServer(engine(), config)
  await served.start()
  try:
    async with aiohttp.ClientSession() as http:
      stranger = Browser(served.url, http)
      for method, path in [
        ("POST", "/generate"),
        ("POST", "/abort_request"),
        ("POST", "/update_weights_from_disk"),
        ("GET", "/metrics"),
        ("GET", "/get_server_info"),
        ("GET", "/nothing"),
      ]:
        status, reply = await stranger(method, path, {})
        assert status == 401 and "key" in reply["error"]["message"]
      assert (await Browser(served.url, http, "wrong")("GET", "/metrics"))[
        0
      ] == 401
      assert (await stranger("GET", "/health"))[0] == 200
      friend = Browser(served.url, http, "secret")
      assert (await friend.generate())[0] == 200
  finally:
    await served.stop()


async def test_draining_waits_and_refuses_and_gives_up():
  made = engine(delay=0.02)
  async with Serving(engine=made) as (_, served, browser):
    task = asyncio.create_task(
      browser.generate(sampling_params={"max_new_tokens": 10})
    )
    await until(lambda: made.stats()["running"] == 1)
    drained = asyncio.create_task(served.drain(20.0))
    await asyncio.sleep(0)
    status, reply = await browser.generate()
    assert status == 503 and "shutting down" in reply["error"]["message"]
    await drained
    assert (await task)[1]["meta_info"]["completion_tokens"] == 10
  made = engine(delay=0.02)
  async with Serving(engine=made) as (_, served, browser):
    task = asyncio.create_task(
      browser.generate(sampling_params={"max_new_tokens": 200})
    )
    await until(lambda: made.stats()["running"] == 1)
    await served.drain(0.1)
    await served.stop()  # what still runs ends with what it has
    assert (await task)[1]["meta_info"]["finish_reason"]["type"] == "abort"


async def test_a_port_in_use_is_an_error_with_its_number():
  async with Serving() as (_, served, _):
    port = int(served.url.rpartition(":")[2])
    second = server.EngineServer(engine(), server.EngineServerConfig(port=port))
    with pytest.raises(errors.EngineError, match=f"{port}: is in use"):
      await second.start()


# What a value may be in a malformed body, whatever its key.
_VALUES = (
  *(None, True, 0, -1, 2**70, 1.5, float("inf"), float("nan"), "", "x", "\x00"),
  *([], {}, [1], [[1]], [[1], [2]], [None], ["a"], {"a": 1}, [1] * 300),
)
_KEYS = (
  *("input_ids", "rid", "sampling_params", "return_logprob", "stream", "text"),
  *("top_logprobs_num", "logprob_start_len", "abort_all", "model_path", "zzz"),
  "weight_version",
)
_SAMPLING_KEYS = (
  *("max_new_tokens", "temperature", "top_p", "top_k", "stop", "n", "ebnf"),
  *("stop_token_ids", "sampling_seed", "logit_bias", "ignore_eos", "regex"),
)


def malformed(rng):
  """A path and a body that are right in parts."""
  value = lambda keys: {
    key: rng.choice(_VALUES) for key in rng.sample(keys, rng.randint(0, 4))
  }
  body = value(_KEYS)
  if rng.random() < 0.6:
    body["input_ids"] = rng.choice([[1, 2], [[1], [2, 3]]])
  if rng.random() < 0.7:
    body["sampling_params"] = value(_SAMPLING_KEYS)
  path = rng.choice(
    (
      *("/generate",) * 5,
      *("/abort_request", "/update_weights_from_disk", "/flush_cache"),
    )
  )
  return path, json.dumps(body) if rng.random() < 0.95 else rng.randbytes(30)


async def test_malformed_bodies_never_get_a_500():
  rng = random.Random(0)
  async with Serving() as (made, _, browser):
    for _ in range(8):
      asked = [malformed(rng) for _ in range(50)]
      answers = await asyncio.gather(
        *(browser("POST", path, data=data) for path, data in asked)
      )
      for (path, data), (status, reply) in zip(asked, answers, strict=True):
        assert status in (200, 400), (path, data, reply)
    assert (await browser.generate())[0] == 200
    assert made.stats()["running"] == 0
