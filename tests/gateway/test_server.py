import asyncio
import itertools
import json
import threading

import aiohttp
import httpx
import openai
import pytest

from forge_jax import errors, types
from forge_jax.gateway import client as gateway_client
from forge_jax.gateway import server, sessions


def user(text):
  return {"role": "user", "content": text}


CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "%s"}}\n</tool_call>'


async def test_three_turns_keep_every_sampled_id(
  start, tool_tokenizer, calculator
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  # Not as the template would write it: two spaces, a trailing one.
  h.say("I  will. " + CALL % "2*3", CALL % "6+1", "It is 7.")
  messages = [user("What is 2*3+1?")]
  for observation in ("6", "7", None):
    reply = await h.chat(keys, messages, tools=[calculator])
    messages.append(reply["choices"][0]["message"])
    if observation:
      call = messages[-1]["tool_calls"][0]
      messages.append(
        {"role": "tool", "tool_call_id": call["id"], "content": observation}
      )
  completions, _ = await h.admin.close_session("s")
  assert len(completions) == 3
  for n, (before, after) in enumerate(itertools.pairwise(completions), 1):
    seen = before.prompt_ids.tolist() + before.response_ids.tolist()
    assert after.prompt_ids.tolist()[: len(seen)] == seen
    assert after.parent == before.id
    assert after.prompt_ids.tolist() == h.requests[n].prompt_ids.tolist()
  assert h.text(completions[0].response_ids).startswith("I  will. <tool_call>")
  assert [c.stop_reason for c in completions] == [types.StopReason.STOP] * 3
  assert messages[-1]["content"] == "It is 7."
  assert completions[0].logprobs.dtype == "float32"
  assert completions[0].started <= completions[0].finished


@pytest.mark.parametrize(
  "said",
  [
    "Naïve café: 日本語 🙂!",
    "Let me see. " + CALL % "1+1",
    "<think>\nhm, 1?\n</think>\n\nThe answer is 1.",
    "  two spaces, then text  ",
    CALL[:-3] % "broken",
  ],
)
async def test_streamed_and_whole_replies_are_the_same(
  start, tool_tokenizer, calculator, said
):
  h = await start(tool_tokenizer, delay=0.0001)
  whole_keys, stream_keys = await h.open("whole"), await h.open("stream")
  h.say(said, said)
  body = {"tools": [calculator]}
  whole = await h.chat(whole_keys, [user("?")], return_token_ids=True, **body)
  message = whole["choices"][0]["message"]
  client = openai.AsyncOpenAI(
    api_key=stream_keys.api_key,
    base_url=stream_keys.base_url,
    http_client=httpx.AsyncClient(),
    max_retries=0,
  )
  stream = await client.chat.completions.create(
    model="m",
    messages=[user("?")],
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"return_token_ids": True},
    **body,
  )
  content, reasoning, calls, token_ids, finish, usage = (
    "",
    "",
    [],
    [],
    None,
    None,
  )
  async for chunk in stream:
    if chunk.usage:
      usage = chunk.usage
    for choice in chunk.choices:
      content += choice.delta.content or ""
      reasoning += getattr(choice.delta, "reasoning_content", None) or ""
      calls += choice.delta.tool_calls or []
      token_ids += getattr(choice, "token_ids", None) or []
      finish = finish or choice.finish_reason
  await client.close()
  assert token_ids == whole["choices"][0]["token_ids"]
  assert content == (message["content"] or "")
  assert reasoning == (message.get("reasoning_content") or "")
  assert finish == whole["choices"][0]["finish_reason"]
  assert [c.function.arguments for c in calls] == [
    c["function"]["arguments"] for c in message.get("tool_calls", [])
  ]
  assert usage.completion_tokens == whole["usage"]["completion_tokens"]
  (a,), _ = await h.admin.close_session("whole")
  (b,), _ = await h.admin.close_session("stream")
  assert a.response_ids.tolist() == b.response_ids.tolist()
  assert a.logprobs.tolist() == b.logprobs.tolist()


async def test_text_is_streamed_as_it_is_sampled(start, smollm2):
  h = await start(smollm2, delay=0.001)
  keys = await h.open()
  h.say("one two three four five six")
  pieces = []
  async with h.http.post(
    h.gateway.url + "/v1/chat/completions",
    json={"model": "m", "messages": [user("?")], "stream": True},
    headers={"Authorization": f"Bearer {keys.api_key}"},
  ) as response:
    assert response.content_type == "text/event-stream"
    async for line in response.content:
      if line.startswith(b"data: {"):
        choice = json.loads(line[6:])["choices"][0]
        pieces.append(choice["delta"].get("content", ""))
  assert len([p for p in pieces if p]) >= 6
  assert "".join(pieces) == "one two three four five six"


async def test_a_streamed_reply_is_extended_like_any_other(
  start, tool_tokenizer, calculator
):
  h = await start(tool_tokenizer, delay=0.0001)
  keys = await h.open()
  h.say("Sure. " + CALL % "1+1", "2")
  client = openai.AsyncOpenAI(
    api_key=keys.api_key, base_url=keys.base_url, max_retries=0
  )
  messages = [user("1+1?")]
  async with client.chat.completions.stream(
    model="m", messages=messages, tools=[calculator]
  ) as stream:
    final = (await stream.get_final_completion()).choices[0].message
  await client.close()
  messages.append(final.to_dict())
  call = final.tool_calls[0]
  messages.append({"role": "tool", "tool_call_id": call.id, "content": "2"})
  await h.chat(keys, messages, tools=[calculator])
  (first, second), _ = await h.admin.close_session("s")
  assert second.parent == first.id
  seen = first.prompt_ids.tolist() + first.response_ids.tolist()
  assert second.prompt_ids.tolist()[: len(seen)] == seen


async def test_a_malformed_call_reaches_the_agent_as_text(
  start, tool_tokenizer, calculator
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  said = "<tool_call>\n{'name': calculate}\n</tool_call>"
  h.say(said, "sorry")
  reply = await h.chat(keys, [user("?")], tools=[calculator])
  choice = reply["choices"][0]
  assert choice["message"]["content"] == said
  assert "tool_calls" not in choice["message"]
  assert choice["finish_reason"] == "stop"
  follow_up = [user("?"), choice["message"], user("That was no JSON.")]
  await h.chat(keys, follow_up, tools=[calculator])
  (first, second), _ = await h.admin.close_session("s")
  assert second.parent == first.id


async def test_two_lineages_interleave_in_one_session(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("a0", "b0", "a1", "b1")
  main, sub = [user("main task")], [user("sub task")]
  for _ in range(2):
    for messages in (main, sub):
      reply = await h.chat(keys, messages)
      messages += [reply["choices"][0]["message"], user("go on")]
  completions, _ = await h.admin.close_session("s")
  assert [c.parent for c in completions] == [None, None, "s/0", "s/1"]
  assert all(c.fork_reason is None for c in completions)
  forest = [h.text(c.prompt_ids) for c in completions[2:]]
  assert "main task" in forest[0] and "sub task" not in forest[0]
  assert "sub task" in forest[1] and "main task" not in forest[1]


async def test_concurrent_requests_of_a_session(start, smollm2):
  h = await start(smollm2, delay=0.001)
  keys = await h.open()
  h.say(*(f"reply {n}" for n in range(8)))
  replies = await asyncio.gather(
    *(h.chat(keys, [user(f"question {n}")]) for n in range(8))
  )
  completions, _ = await h.admin.close_session("s")
  assert [c.id for c in completions] == [f"s/{n}" for n in range(8)]
  assert len({r["id"] for r in replies}) == 8


async def test_keys_separate_sessions(start, smollm2):
  h = await start(smollm2)
  one, two = await h.open("one/1"), await h.open("two")
  h.say("1", "2", "by path")
  await h.chat(one, [user("?")])
  await h.chat(two, [user("?")])
  path = f"/s/{one.api_key}/v1/chat/completions"
  status, _ = await h.post(None, {"messages": [user("other")]}, path)
  assert status == 200
  # The engine is told whose requests they are, to be fair between sessions.
  assert [r.session for r in h.requests] == ["one/1", "two", "one/1"]
  completions, _ = await h.admin.close_session("one/1")
  assert len(completions) == 2
  wrong = gateway_client.SessionKeys("forge-two-guess", two.base_url, "")
  for keys in (None, wrong, one):
    status, reply = await h.post(keys, {"messages": [user("?")]})
    assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
    assert two.api_key not in json.dumps(reply)


async def test_admin_routes_need_the_admin_token(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  for token in ("", "wrong", keys.api_key):
    headers = {"Authorization": f"Bearer {token}"}
    for method, path in (
      ("POST", "/admin/sessions"),
      ("GET", "/admin/sessions/s"),
      ("GET", "/admin/sessions/s/forest"),
      ("POST", "/sessions/s/reward"),
      ("POST", "/sessions/s/close"),
    ):
      async with h.http.request(
        method, h.gateway.url + path, json={}, headers=headers
      ) as response:
        assert response.status == 401, (method, path)
  async with h.http.get(h.gateway.url + "/health") as response:
    assert response.status == 200


async def test_a_client_that_leaves_aborts_its_request(start, smollm2):
  h = await start(smollm2, delay=0.01)
  keys = await h.open()
  h.say("word " * 500, "word " * 500)
  for stream in (False, True):
    with pytest.raises(TimeoutError):
      await asyncio.wait_for(
        h.post(keys, {"messages": [user("?")], "stream": stream}), 0.3
      )
    for _ in range(200):
      if not h.engine.stats()["running"]:
        break
      await asyncio.sleep(0.02)
    assert h.engine.stats()["running"] == 0
  completions, _ = await h.admin.close_session("s")
  assert [c.stop_reason for c in completions] == [types.StopReason.ABORT] * 2
  for completion in completions:
    count = len(completion.response_ids)
    assert 0 < count < 500
    assert len(completion.logprobs) == len(completion.versions) == count


async def test_closing_a_session_aborts_what_it_runs(start, smollm2):
  h = await start(smollm2, delay=0.01)
  keys = await h.open()
  h.say("word " * 500)
  running = asyncio.create_task(h.post(keys, {"messages": [user("?")]}))
  while not h.engine.stats()["tokens_sampled"]:
    await asyncio.sleep(0.01)
  (completion,), _ = await h.admin.close_session("s")
  assert completion.stop_reason == types.StopReason.ABORT
  assert 0 < len(completion.response_ids) < 500
  status, reply = await running
  assert (status, reply["error"]["code"]) == (503, "aborted")
  status, _ = await h.post(keys, {"messages": [user("?")]})
  assert status == 401


async def test_a_session_closed_while_a_prompt_is_encoded_samples_nothing(
  start, smollm2, monkeypatch
):
  h = await start(smollm2)
  keys = await h.open()
  encoding, free = threading.Event(), threading.Event()
  encode = h.gateway.renderer.encode_rest

  def slowly(text):
    encoding.set()
    return free.wait(30) and encode(text)

  monkeypatch.setattr(h.gateway.renderer, "encode_rest", slowly)
  running = asyncio.create_task(
    h.post(keys, {"messages": [user("long " * 1000)]})
  )
  assert await asyncio.to_thread(encoding.wait, 30)
  closing = asyncio.create_task(h.admin.close_session("s"))
  while not h.gateway._table.by_id("s").closed:
    await asyncio.sleep(0.01)
  free.set()
  assert (await closing)[0] == () and h.requests == []
  assert (await running)[0] == 401


async def test_a_prompt_over_the_context_is_refused(start, smollm2):
  h = await start(smollm2, max_context=64)
  keys = await h.open()
  for stream in (False, True):
    body = {"messages": [user("long " * 100)], "stream": stream}
    status, reply = await h.post(keys, body)
    assert status == 400
    assert reply["error"]["code"] == "context_length_exceeded"
    assert "64" in reply["error"]["message"]
  assert (await h.admin.close_session("s"))[0] == ()


async def test_cut_replies_say_so_and_are_closed_for_the_next_turn(
  start, smollm2
):
  h = await start(smollm2)
  keys = await h.open()
  h.say("one two three four", "fine")
  reply = await h.chat(keys, [user("count")], max_tokens=3)
  choice = reply["choices"][0]
  assert choice["finish_reason"] == "length"
  assert reply["usage"]["completion_tokens"] == 3
  await h.chat(keys, [user("count"), choice["message"], user("more")])
  (first, second), _ = await h.admin.close_session("s")
  assert first.stop_reason == types.StopReason.LENGTH
  seen = first.prompt_ids.tolist() + first.response_ids.tolist()
  assert second.prompt_ids.tolist()[: len(seen)] == seen
  assert h.text(second.prompt_ids[len(seen) :]) == (
    "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
  )


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_are_cut_from_the_text_only(start, smollm2, stream):
  h = await start(smollm2, delay=0.0001)
  keys = await h.open()
  h.say("alpha beta END gamma")
  body = {"messages": [user("?")], "stop": ["END"], "stream": stream}
  async with h.http.post(
    h.gateway.url + "/v1/chat/completions",
    json={"model": "m", **body},
    headers={"Authorization": f"Bearer {keys.api_key}"},
  ) as response:
    text = (await response.read()).decode()
  if stream:
    chunks = [json.loads(x[6:]) for x in text.split("\n\n")[:-2]]
    content = "".join(
      c["choices"][0]["delta"].get("content", "") for c in chunks
    )
    finish = chunks[-1]["choices"][0]["finish_reason"]
  else:
    choice = json.loads(text)["choices"][0]
    content, finish = choice["message"]["content"], choice["finish_reason"]
  assert (content, finish) == ("alpha beta ", "stop")
  (completion,), _ = await h.admin.close_session("s")
  assert "END" in h.text(completion.response_ids)


async def test_sampling_values_of_session_and_request(start, smollm2):
  h = await start(smollm2)
  sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40}
  keys = await h.open(seed=7, sampling=sampling)
  h.say("a", "b", "c")
  await h.chat(keys, [user("1")])
  await h.chat(keys, [user("2")], temperature=0, top_p=1, seed=3, max_tokens=5)
  await h.chat(keys, [user("3")])
  first, second, third = (r.sampling for r in h.requests)
  assert (first.temperature, first.top_p, first.top_k) == (0.5, 0.9, 40)
  assert (second.temperature, second.top_p, second.top_k) == (0, 1, 40)
  assert second.max_tokens == 5
  assert first.max_tokens == 4096 - len(h.requests[0].prompt_ids)
  assert first.seed == sessions.request_seed(7, 0)
  assert second.seed == 3
  assert third.seed == sessions.request_seed(7, 2) != first.seed


async def test_weight_versions_and_logprobs_are_recorded(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("one", "two")
  reply = await h.chat(keys, [user("?")], logprobs=True)
  h.engine.update_weights(types.WeightsVersion(5, params={}))
  await h.chat(keys, [user("!")])
  (first, second), _ = await h.admin.close_session("s")
  assert set(first.versions.tolist()) == {0}
  assert set(second.versions.tolist()) == {5}
  content = reply["choices"][0]["logprobs"]["content"]
  assert [t["logprob"] for t in content] == first.logprobs.tolist()
  assert "".join(t["token"] for t in content) == "one<|im_end|>"


async def test_rewards_come_back_with_the_session(start, smollm2):
  h = await start(smollm2)
  await h.open()
  rewards = (
    types.Reward("outcome", types.Component.PERF, 1.0),
    types.Reward("format", types.Component.PROCESS, -0.25, step=2),
  )
  for reward in rewards:
    await h.admin.post_reward("s", reward)
  assert await h.admin.close_session("s") == ((), rewards)
  with pytest.raises(errors.GatewayError, match=r"409.*closed"):
    await h.admin.post_reward("s", rewards[0])


async def test_forest_as_json(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("hi", "yes")
  reply = await h.chat(keys, [user("hello")])
  await h.chat(
    keys, [user("hello"), reply["choices"][0]["message"], user("ok?")]
  )
  nodes = (await h.admin.forest("s"))["nodes"]
  assert [(n["id"], n["parent"], n["sampled"]) for n in nodes] == [
    ("s/0/prompt", None, False),
    ("s/0", "s/0/prompt", True),
    ("s/1/prompt", "s/0", False),
    ("s/1", "s/1/prompt", True),
  ]
  ids = [i for n in nodes[:3] for i in n["token_ids"]]
  assert list(ids) == h.requests[1].prompt_ids.tolist()


async def test_models_and_unknown_routes(start, smollm2):
  h = await start(smollm2, model_name="smol")
  keys = await h.open()
  headers = {"Authorization": f"Bearer {keys.api_key}"}
  async with h.http.get(h.gateway.url + "/v1/models", headers=headers) as r:
    assert [m["id"] for m in (await r.json())["data"]] == ["smol"]
  for method, path, status in (
    ("GET", "/v1/nothing", 404),
    ("GET", "/v1/chat/completions", 405),
  ):
    async with h.http.request(method, h.gateway.url + path) as r:
      assert r.status == status
      assert (await r.json())["error"]["type"] == "invalid_request_error"


async def test_bodies_that_are_not_requests(start, smollm2):
  h = await start(smollm2, max_body_bytes=2000)
  keys = await h.open()
  headers = {"Authorization": f"Bearer {keys.api_key}"}
  url = h.gateway.url + "/v1/chat/completions"
  for data, status in (
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b"[" * 1900, 400),
    (b"x" * 3000, 413),
  ):
    async with h.http.post(url, data=data, headers=headers) as response:
      assert response.status == status
      assert (await response.json())["error"]["message"]


async def test_text_that_is_no_unicode(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  lone = "\ud800"
  status, reply = await h.post(keys, {"messages": [user(lone)]})
  assert status == 400
  assert "surrogate" in reply["error"]["message"]
  h.say("🙂")  # sent as an escaped pair of surrogates, which is text
  await h.chat(keys, [user("🙂")])
  assert "🙂" in h.text(h.requests[0].prompt_ids)
  for header in ("Bearer \udcff\udcfe", "Bearer", "Basic eDp5", ""):
    async with h.http.post(
      h.gateway.url + "/admin/sessions", headers={"Authorization": header}
    ) as response:
      assert response.status == 401


async def test_a_body_that_is_nested_too_deeply(
  start, tool_tokenizer, calculator
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  for depth in (300, 600, 900):
    parameters = json.loads('{"a":' * depth + "1" + "}" * depth)
    function = {"name": "f", "parameters": parameters}
    h.replies = [h.ids("fine")]
    status, _ = await h.post(
      keys,
      {
        "messages": [user("?")],
        "tools": [{"type": "function", "function": function}],
      },
    )
    assert status in (200, 400)
  assert not (await h.admin.close_session("s"))[1]


async def test_an_engine_that_fails_is_a_500(start, smollm2, caplog):
  h = await start(smollm2)
  keys = await h.open()
  status, reply = await h.post(keys, {"messages": [user("?")]})
  assert (status, reply["error"]["type"]) == (500, "server_error")
  assert keys.api_key not in caplog.text
  assert (await h.admin.close_session("s"))[0] == ()


async def test_a_port_in_use_is_named(start, smollm2):
  h = await start(smollm2)
  port = int(h.gateway.url.rpartition(":")[2])
  other = server.Gateway(h.engine, smollm2, server.GatewayConfig(port=port))
  with pytest.raises(
    errors.GatewayError, match=rf"127.0.0.1:{port}: is in use"
  ):
    await other.start()


async def test_a_gateway_that_is_not_there(unused_tcp_port):
  url = f"http://127.0.0.1:{unused_tcp_port}"
  admin = gateway_client.GatewayClient(url, "token")
  with pytest.raises(errors.GatewayError, match=url):
    await admin.open_session("s", seed=0)
  await admin.aclose()


@pytest.mark.parametrize(
  "opening",
  [
    {"id": ""},
    {"id": 3},
    {"id": "t", "seed": -1},
    {"id": "t", "seed": 0.5},
    {"id": "t", "sampling": {"temprature": 1}},
    {"id": "t", "sampling": {"temperature": 3}},
    {"id": "t", "sampling": {"top_k": 1.5}},
    {"id": "s"},
  ],
)
async def test_sessions_that_cannot_be_opened(start, smollm2, opening):
  h = await start(smollm2)
  await h.open("s")
  headers = {"Authorization": f"Bearer {h.gateway.admin_token}"}
  async with h.http.post(
    h.gateway.url + "/admin/sessions", json=opening, headers=headers
  ) as response:
    assert response.status in (400, 409)


async def test_stopping_ends_requests_in_flight(start, smollm2):
  h = await start(smollm2, delay=0.01)
  keys = await h.open()
  h.say("word " * 500)
  running = asyncio.create_task(h.post(keys, {"messages": [user("?")]}))
  while not h.engine.stats()["tokens_sampled"]:
    await asyncio.sleep(0.01)
  await h.gateway.stop()
  try:
    status, _ = await running
    assert status == 503
  except aiohttp.ClientError:
    pass  # the connection was closed before the reply
  assert h.engine.stats()["running"] == 0


async def test_an_engine_out_of_reach_is_worth_a_retry(start, smollm2):
  h = await start(smollm2)

  async def unavailable(request):
    raise errors.EngineUnavailableError("the engine failed: device on fire")
    yield

  h.engine.generate = unavailable
  keys = await h.open()
  body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
  async with h.http.post(
    h.gateway.url + "/v1/chat/completions",
    json=body,
    headers={"Authorization": f"Bearer {keys.api_key}"},
  ) as response:
    reply = await response.json()
  assert response.status == 503 and response.headers["Retry-After"] == "1"
  assert reply["error"]["code"] == "engine_unavailable"
  assert "device on fire" in reply["error"]["message"]
