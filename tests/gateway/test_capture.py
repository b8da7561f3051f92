"""What is recorded of a completion beside its tokens."""

import asyncio

import anthropic
import openai
import pytest

from forge_jax import errors, types

ASK = [{"role": "user", "content": "hi"}]


async def closed(h):
  completions, _ = await h.admin.close_session("s")
  return completions


async def test_what_asked_for_a_completion(start, tool_tokenizer):
  h = await start(tool_tokenizer)
  keys = await h.open()
  h.say("one", "two")
  client = anthropic.AsyncAnthropic(
    api_key=keys.api_key,
    base_url=h.gateway.url,
    default_headers={"x-claude-code-session-id": "abc"},
    http_client=anthropic.DefaultAsyncHttpxClient(trust_env=False),
  )
  async with client:
    await client.messages.create(
      model="claude-x",
      max_tokens=50,
      messages=ASK,
      extra_headers={"x-claude-code-agent-id": "explorer"},
    )
  await h.chat(keys, ASK, model="gpt-x")
  one, two = await closed(h)
  assert one.request.protocol == "/messages"
  assert one.request.model == "claude-x"
  assert one.request.kind == types.RequestKind.SUB_AGENT
  assert one.request.client_ids == {
    "x-claude-code-session-id": "abc",
    "x-claude-code-agent-id": "explorer",
  }
  assert two.request.protocol == "/chat/completions"
  assert (two.request.model, two.request.client_ids) == ("gpt-x", {})
  assert one.request.digest != two.request.digest
  for c in (one, two):
    assert c.request.retry_of is None and c.delivered
    moments = [c.request.arrived, c.started, c.first_token, c.finished]
    assert moments == sorted(moments) and moments[0] >= 0


async def test_a_retry_after_a_lost_connection_is_tied(start, smollm2):
  h = await start(smollm2, delay=0.05)
  keys = await h.open()
  h.say("a reply that takes its time to be said", "again")
  body = {"messages": ASK, "stream": True}
  with pytest.raises(TimeoutError):
    async with asyncio.timeout(0.3):
      await h.post(keys, body)
  assert (await h.post(keys, {"messages": ASK, "seed": 1}))[0] == 200
  h.say("and again", "the same, on purpose")
  for _ in range(2):
    async with h.http.post(
      h.gateway.url + "/v1/chat/completions",
      json={"model": "m", **body},
      headers={"Authorization": f"Bearer {keys.api_key}"},
    ) as response:
      assert "[DONE]" in await response.text()
  lost, other, retry, same = await closed(h)
  assert lost.stop_reason == types.StopReason.ABORT and not lost.delivered
  assert len(lost.response_ids) > 0
  assert retry.request.digest == lost.request.digest
  assert [c.request.retry_of for c in (lost, other, retry, same)] == [
    None,
    None,
    lost.id,
    None,
  ]
  assert other.delivered and retry.delivered and same.delivered


async def test_an_sdk_s_retry_after_a_failure_is_tied(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("1", "2", "3", "4")
  generate, calls = h.engine.generate, []

  async def fail_first(request):
    calls.append(request)
    async for chunk in generate(request):
      yield (
        chunk
        if len(calls) > 2
        else type(chunk)(chunk.token_ids, chunk.logprobs, chunk.versions)
      )
    if len(calls) <= 2:
      raise errors.EngineUnavailableError("the engine restarts")

  h.engine.generate = fail_first
  async with openai.AsyncOpenAI(
    api_key=keys.api_key,
    base_url=keys.base_url,
    max_retries=2,
    http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
  ) as client:
    made = await client.chat.completions.create(model="m", messages=ASK, n=2)
  assert len(made.choices) == 2
  completions = await closed(h)
  retries = [c for c in completions if c.request.retry_of]
  assert [c.request.retry_of for c in retries] == [
    c.id for c in completions if not c.delivered
  ]
  assert [c.delivered for c in completions[-2:]] == [True, True]


async def test_a_malformed_call_is_text_and_marked(
  start, tool_tokenizer, calculator
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  said = "<tool_call>\nbroken\n</tool_call>"
  h.say(said, "fine")
  reply = await h.chat(keys, ASK, tools=[calculator])
  message = reply["choices"][0]["message"]
  assert message["content"] == said and "tool_calls" not in message
  await h.chat(keys, ASK)
  forest = await h.admin.forest("s")
  sampled = [node for node in forest["nodes"] if node["sampled"]]
  assert [node["malformed"] for node in sampled] == [True, False]
  assert sampled[0]["request"]["kind"] == "main"
  assert [c.malformed for c in await closed(h)] == [True, False]
