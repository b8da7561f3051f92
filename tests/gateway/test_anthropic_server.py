"""The Messages protocol over HTTP, mostly through Anthropic's own client."""

import contextlib
import copy
import itertools
import json

import anthropic
import httpx2
import pytest

from forge_jax import errors
from forge_jax.engine import api
from forge_jax.gateway import lineages
from forge_jax.gateway.dialects import anthropic_messages, anthropic_reply

CALL = (
  '<tool_call>\n{"name": "%s", "arguments": {"expression": "%s"}}\n</tool_call>'
)
TOOL = {
  "name": "calculate",
  "description": "Calculates.",
  "input_schema": {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
  },
}


def user(content):
  return {"role": "user", "content": content}


def result(id, content, **fields):
  return {
    "type": "tool_result",
    "tool_use_id": id,
    "content": content,
    **fields,
  }


@contextlib.asynccontextmanager
async def connect(h, keys):
  async with anthropic.AsyncAnthropic(
    api_key=keys.api_key,
    base_url=h.gateway.url,
    http_client=httpx2.AsyncClient(),
    max_retries=0,
  ) as client:
    yield client


async def say(client, stream, **body):
  """A finished message, streamed or not."""
  body = {"model": "m", "max_tokens": 500, **body}
  if not stream:
    return await client.messages.create(**body)
  async with client.messages.stream(**body) as events:
    return await events.get_final_message()


async def post(h, keys, body, path="/v1/messages"):
  body = {"max_tokens": 500, **body}
  return await h.post(keys, body, path)


async def events_of(h, keys, body):
  """The server-sent events of a streamed message, as (name, data)."""
  body = {"model": "m", "max_tokens": 500, "stream": True, **body}
  async with h.http.post(
    h.gateway.url + "/v1/messages",
    json=body,
    headers={"x-api-key": keys.api_key},
  ) as response:
    assert response.content_type == "text/event-stream"
    text = (await response.read()).decode()
  events = []
  for event in text.removesuffix("\n\n").split("\n\n"):
    name, data = event.split("\n")
    events.append((name.removeprefix("event: "), json.loads(data[6:])))
  assert all(name == data["type"] for name, data in events)
  return events


def assert_one_lineage(h, completions, forest):
  """Each completion extends the one before, every sampled id kept."""
  for n, (before, after) in enumerate(itertools.pairwise(completions), 1):
    seen = before.prompt_ids.tolist() + before.response_ids.tolist()
    assert after.parent == before.id
    assert after.prompt_ids.tolist()[: len(seen)] == seen
    assert after.prompt_ids.tolist() == h.requests[n].prompt_ids.tolist()
  assert [node["mismatch"] for node in forest["nodes"]] == [None] * len(
    forest["nodes"]
  )
  assert len(forest["nodes"]) == 2 * len(completions)


@pytest.mark.parametrize("stream", [False, True])
async def test_turns_with_tools_and_thinking_keep_every_sampled_id(
  start, tool_tokenizer, stream
):
  h = await start(tool_tokenizer, delay=0.0001 if stream else 0)
  keys = await h.open()
  # Not as the template would write it: two spaces, a call after another.
  h.say(
    "<think>\nhm,  é?\n</think>\n\nI  will. " + CALL % ("calculate", "2*3"),
    CALL % ("calculate", "6+1") + "\n" + CALL % ("calculate", "7-0"),
    "It is 7.",
    "Bye.",
  )
  messages, replies = [user("What is 2*3+1?")], []
  async with connect(h, keys) as client:
    for _ in range(4):
      reply = await say(client, stream, messages=messages, tools=[TOOL])
      replies.append(reply)
      messages.append({"role": "assistant", "content": reply.content})
      calls = [b for b in reply.content if b.type == "tool_use"]
      messages.append(
        user([result(call.id, "6") for call in calls] or "Thanks.")
      )
  forest = await h.admin.forest("s")
  completions, _ = await h.admin.close_session("s")
  assert_one_lineage(h, completions, forest)
  first, second, third, _ = replies
  kinds = [b.type for b in first.content]
  assert kinds == ["thinking", "text", "tool_use"]
  assert first.content[0].thinking.strip() == "hm,  é?"
  assert first.content[1].text.strip() == "I  will."
  assert first.content[2].input == {"expression": "2*3"}
  assert [b.input["expression"] for b in second.content] == ["6+1", "7-0"]
  assert len({b.id for b in [first.content[2], *second.content]}) == 3
  assert [b.text for b in third.content] == ["It is 7."]
  assert [r.stop_reason for r in replies[:3]] == [
    "tool_use",
    "tool_use",
    "end_turn",
  ]
  for before, reply, completion in zip(
    [None, *completions], replies, completions, strict=False
  ):
    usage, cached = reply.usage, 0
    if before is not None:
      cached = len(before.prompt_ids) + len(before.response_ids)
    assert usage.cache_read_input_tokens == cached
    assert usage.input_tokens + cached == len(completion.prompt_ids)
    assert usage.output_tokens == len(completion.response_ids)


@pytest.mark.parametrize(
  "said",
  [
    "Naïve café: 日本語 🙂!",
    "Let me see. " + CALL % ("calculate", "1+1"),
    "<think>\nhm, 1?\n</think>\n\nThe answer is 1.",
    "<think>\n\n</think>\n\nThe answer is 1.",
    "<think>\nnothing said\n</think>\n\n",
    "  two spaces, then text  ",
    (CALL % ("calculate", "broken"))[:-3],
    "",
  ],
)
@pytest.mark.parametrize("display", ["summarized", "omitted"])
async def test_streamed_and_whole_replies_are_the_same(
  start, tool_tokenizer, said, display
):
  h = await start(tool_tokenizer, delay=0.0001)
  whole_keys, stream_keys = await h.open("whole"), await h.open("stream")
  h.say(said, said)
  body = {
    "messages": [user("?")],
    "tools": [TOOL],
    "thinking": {"type": "adaptive", "display": display},
  }
  async with connect(h, whole_keys) as client:
    whole = (await say(client, False, **body)).to_dict()
  async with connect(h, stream_keys) as client:
    streamed = (await say(client, True, **body)).to_dict()
  for reply in (whole, streamed):
    reply.pop("id")
    for block in reply["content"]:
      block.pop("parsed_output", None)
  assert streamed == whole
  (a,), _ = await h.admin.close_session("whole")
  (b,), _ = await h.admin.close_session("stream")
  assert a.response_ids.tolist() == b.response_ids.tolist()


async def test_events_come_in_the_order_of_the_protocol(start, tool_tokenizer):
  h = await start(tool_tokenizer, delay=0.0001)
  keys = await h.open()
  call = CALL % ("calculate", "1+1")
  h.say(f"<think>\nhm\n</think>\n\nOne two three. {call}\n{call}")
  body = {"messages": [user("?")], "tools": [TOOL]}
  events = await events_of(h, keys, body)
  order = []
  for name, data in events:
    step = (name, data.get("index"), data.get("delta", {}).get("type"))
    if not order or step != order[-1]:
      order.append(step)
  block = "content_block_"
  assert order == [
    ("message_start", None, None),
    (block + "start", 0, None),
    (block + "delta", 0, "thinking_delta"),
    (block + "delta", 0, "signature_delta"),
    (block + "stop", 0, None),
    (block + "start", 1, None),
    (block + "delta", 1, "text_delta"),
    (block + "stop", 1, None),
    (block + "start", 2, None),
    (block + "delta", 2, "input_json_delta"),
    (block + "stop", 2, None),
    (block + "start", 3, None),
    (block + "delta", 3, "input_json_delta"),
    (block + "stop", 3, None),
    ("message_delta", None, None),
    ("message_stop", None, None),
  ]
  message = events[0][1]["message"]
  prompt = len(h.requests[0].prompt_ids)
  assert message["content"] == [] and message["stop_reason"] is None
  assert message["usage"]["input_tokens"] == prompt
  assert message["usage"]["output_tokens"] == 1  # sent with the first token
  starts = [e["content_block"] for name, e in events if name == block + "start"]
  assert starts[0] == {"type": "thinking", "thinking": "", "signature": ""}
  assert starts[1] == {"type": "text", "text": ""}
  assert starts[2] == {
    "type": "tool_use",
    "id": starts[2]["id"],
    "name": "calculate",
    "input": {},
  }
  deltas = [e["delta"] for name, e in events if name == block + "delta"]
  texts = [d["text"] for d in deltas if d["type"] == "text_delta"]
  assert "".join(texts).strip() == "One two three."
  assert len(texts) > 2
  last = events[-2][1]
  assert last["delta"] == {
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "stop_details": None,
  }
  assert last["usage"]["output_tokens"] > 5


async def test_silence_is_broken_by_pings(start, tool_tokenizer, monkeypatch):
  monkeypatch.setattr(anthropic_reply, "_PING_S", 0)
  h = await start(tool_tokenizer, delay=0.0001)
  keys = await h.open()
  h.say("<think>\na long thought\n</think>\n\nyes", "yes")
  names = [n for n, _ in await events_of(h, keys, {"messages": [user("?")]})]
  assert names[:2] == ["message_start", "ping"]
  assert names.count("content_block_stop") == 2
  async with connect(h, keys) as client:
    reply = await say(client, True, messages=[user("!")])
  assert reply.content[0].text == "yes"


async def test_what_agents_change_in_a_replay_leaves_it_attached(
  start, tool_tokenizer
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  h.say(CALL % ("calculate", "1+1"), "Two.", "Yes.", "Bye.")
  cached = {"cache_control": {"type": "ephemeral"}}

  def body(header, messages, **cache):
    return {
      "system": [
        {"type": "text", "text": f"x-anthropic-billing-header: cch={header};"},
        {"type": "text", "text": "Be brief.", **cache},
      ],
      "tools": [{**TOOL, **cache}],
      "messages": messages,
      "betas": ["context-1m-2025-08-07"],
    }

  async with connect(h, keys) as client:

    async def ask(**kwargs):
      return await client.beta.messages.create(
        model="m", max_tokens=500, **kwargs
      )

    question = [{"type": "text", "text": "1+1?", **cached}]
    first = await ask(**body("1", [user(question)], **cached))
    (call,) = first.content
    replay = {  # keys in another order, an id of the agent's own
      "name": "calculate",
      "input": dict(call.input),
      "id": "toolu_mine",
      "type": "tool_use",
    }
    messages = [
      user("1+1?"),
      {"role": "assistant", "content": [replay]},
      user([result("toolu_mine", [{"type": "text", "text": "2", **cached}])]),
    ]
    second = await ask(**body("2", messages))
    messages[-1] = user([result("toolu_mine", "2")])
    messages += [
      {"role": "assistant", "content": second.content[0].text},
      {"role": "system", "content": "Be briefer."},
      user([{"type": "text", "text": "Sure?", **cached}]),
    ]
    third = await ask(**body("3", messages, **cached))
    messages[-1] = user("Sure?")
    said = [{"type": "text", "text": third.content[0].text, **cached}]
    messages += [{"role": "assistant", "content": said}, user("Thanks.")]
    await ask(**body("4", messages))
  forest = await h.admin.forest("s")
  completions, _ = await h.admin.close_session("s")
  assert_one_lineage(h, completions, forest)
  seen = h.text(completions[-1].prompt_ids)
  assert "billing" not in seen and "<|im_start|>system\nBe brief.\n" in seen
  assert "<|im_start|>system\nBe briefer.<|im_end|>" in seen


async def test_a_replay_that_says_something_else_forks(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("One.", "Two.")
  async with connect(h, keys) as client:
    await say(client, False, messages=[user("?")])
    edited = {"role": "assistant", "content": "Another."}
    await say(client, False, messages=[user("?"), edited, user("so?")])
  (_, second), _ = await h.admin.close_session("s")
  assert second.parent is None
  assert second.fork_reason == lineages.REPLY_CHANGED


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_that_was_withheld_comes_back(
  start, tool_tokenizer, stream
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  h.say("<think>\nA secret.\n</think>\n\nYes.", "No.")
  async with connect(h, keys) as client:
    reply = await say(
      client,
      stream,
      messages=[user("?")],
      thinking={"type": "adaptive", "display": "omitted"},
    )
    assert reply.content[0].thinking == ""
    messages = [
      user("?"),
      {"role": "assistant", "content": [b.to_dict() for b in reply.content]},
      user("!"),
    ]
    await say(client, stream, messages=messages)
  asked = anthropic_messages.parse(
    {"model": "m", "max_tokens": 1, "messages": messages}
  )
  reasoning = asked.turns[0].messages[1]["reasoning_content"]
  assert reasoning.strip() == "A secret."
  forest = await h.admin.forest("s")
  completions, _ = await h.admin.close_session("s")
  assert_one_lineage(h, completions, forest)
  assert "A secret." in h.text(completions[1].prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_why_a_message_ends(start, smollm2, stream):
  h = await start(smollm2, max_context=64)
  keys = await h.open()
  text = "alpha beta END gamma HALT"
  h.say(text, text, text, "word " * 100)
  async with connect(h, keys) as client:

    async def ask(**body):
      reply = await say(client, stream, messages=[user("?")], **body)
      said = "".join(block.text for block in reply.content)
      return said, reply.stop_reason, reply.stop_sequence

    stops = ["HALT", "END", "nothing"]
    assert await ask(stop_sequences=stops) == (
      "alpha beta ",
      "stop_sequence",
      "END",
    )
    assert await ask(stop_sequences=["absent"]) == (text, "end_turn", None)
    said, *reason = await ask(max_tokens=2)
    assert text.startswith(said) and reason == ["max_tokens", None]
    _, *reason = await ask()
    assert reason == ["model_context_window_exceeded", None]


async def test_how_a_message_is_sampled(start, tool_tokenizer):
  h = await start(tool_tokenizer)
  sampling = {"temperature": 0.5, "top_k": 40}
  keys = await h.open(sampling=sampling)
  two = CALL % ("calculate", "1") + "\n" + CALL % ("calculate", "2")
  h.say("a", "b", two)
  async with connect(h, keys) as client:
    await say(client, False, messages=[user("?")])
    await say(
      client, False, messages=[user("?")], max_tokens=7, extra_body={"top_k": 0}
    )
    reply = await say(
      client,
      False,
      messages=[user("?")],
      tools=[TOOL],
      tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )
    assert [b.input["expression"] for b in reply.content] == ["1"]
  first, second, _ = (r.sampling for r in h.requests)
  assert (first.temperature, first.top_k, first.max_tokens) == (0.5, 40, 500)
  assert (second.top_k, second.max_tokens) == (0, 7)


async def test_a_deferred_tool_is_shown_where_it_is_found(
  start, tool_tokenizer
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  search = {**TOOL, "name": "ToolSearch"}
  found = {**TOOL, "name": "multiply", "defer_loading": True}
  h.say(CALL % ("ToolSearch", "*"), CALL % ("multiply", "2*3"), "6")
  messages = [user("2*3?")]
  async with connect(h, keys) as client:
    for content in (
      [{"type": "tool_reference", "tool_name": "multiply"}],
      "6",
      None,
    ):
      reply = await say(client, False, messages=messages, tools=[search, found])
      messages.append({"role": "assistant", "content": reply.content})
      if content:
        messages.append(user([result(reply.content[0].id, content)]))
  assert reply.content[0].text == "6"
  forest = await h.admin.forest("s")
  completions, _ = await h.admin.close_session("s")
  assert_one_lineage(h, completions, forest)
  assert "multiply" not in h.text(completions[0].prompt_ids)
  added = h.text(completions[1].prompt_ids[len(completions[0].prompt_ids) :])
  assert '"name": "multiply"' in added


async def test_thinking_is_disabled_where_the_template_has_a_choice(
  start, tool_tokenizer
):
  tokenizer = copy.deepcopy(tool_tokenizer)
  tokenizer.chat_template += (
    "{% if add_generation_prompt and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
  )
  h = await start(tokenizer)
  keys = await h.open()
  h.say("yes", "<think>\nhm\n</think>\n\nyes")
  body = {"messages": [user("?")], "thinking": {"type": "disabled"}}
  async with connect(h, keys) as client:
    count = await client.messages.count_tokens(model="m", **body)
    reply = await say(client, False, **body)
    assert reply.usage.input_tokens == count.input_tokens
    body["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    await say(client, False, **body)
  ends = [h.text(r.prompt_ids).endswith("</think>\n\n") for r in h.requests]
  assert ends == [True, False]


async def test_tokens_are_counted_without_a_trace(start, tool_tokenizer):
  h = await start(tool_tokenizer)
  keys = await h.open()
  h.say("hi")
  body = {"messages": [user("?")], "tools": [TOOL], "system": "Be brief."}
  async with connect(h, keys) as client:
    count = await client.messages.count_tokens(model="m", **body)
    beta = await client.beta.messages.count_tokens(model="m", **body)
    reply = await say(client, False, **body)
    assert count.input_tokens == beta.input_tokens == reply.usage.input_tokens
    said = [user("?"), {"role": "assistant", "content": "hi"}]
    more = await client.messages.count_tokens(model="m", messages=said)
    assert more.input_tokens > 0
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
      await client.messages.count_tokens(
        model="m", messages=said, extra_body={"max_tokens": 1}
      )
  assert len((await h.admin.close_session("s"))[0]) == 1
  assert h.engine.stats()["requests"] == 1


async def test_refusals_are_the_errors_of_the_client(start, smollm2):
  h = await start(smollm2, max_context=64, max_body_bytes=2000)
  keys = await h.open()
  async with connect(h, keys) as client:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
      await say(client, False, messages=[user("long " * 100)])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
      await say(client, True, messages=[user("long " * 100)])
    with pytest.raises(anthropic.BadRequestError) as caught:
      await say(client, True, messages=[user("?")], tool_choice={"type": "any"})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.APIStatusError) as caught:
      await say(client, False, messages=[user("x" * 3000)])
    assert caught.value.body["error"]["type"] == "request_too_large"
    with pytest.raises(anthropic.InternalServerError):
      await say(client, False, messages=[user("no reply is queued")])
  assert (await h.admin.close_session("s"))[0] == ()
  for path in ("/v1/messages", "/v1/messages/count_tokens"):
    status, reply = await post(h, keys, {"messages": [user("?")]}, path)
    assert status == 401
    assert reply["type"] == "error"
    assert reply["error"]["type"] == "authentication_error"
    async with h.http.get(h.gateway.url + path) as response:
      assert response.status == 405
      assert (await response.json())["type"] == "error"


async def test_a_failure_in_the_middle_of_a_stream_is_an_event(
  start, smollm2, monkeypatch
):
  h = await start(smollm2)
  keys = await h.open()

  async def fails(request):
    yield api.TokenChunk((5,), (-0.1,), (0,))
    raise errors.EngineError("the engine stopped")

  monkeypatch.setattr(h.engine, "generate", fails)
  async with connect(h, keys) as client:
    with pytest.raises(anthropic.APIStatusError, match="the engine stopped"):
      await say(client, True, messages=[user("?")])
  (completion,), _ = await h.admin.close_session("s")
  assert completion.stop_reason == "abort"


async def test_keys_probes_and_queries_as_agents_send_them(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  for path in ("/", "/health"):
    for method in ("HEAD", "GET"):
      async with h.http.request(method, h.gateway.url + path) as response:
        assert response.status == 200
  h.say("1", "2", "3")
  body = {"model": "m", "max_tokens": 5, "messages": [user("?")]}
  for path, headers in (
    ("/v1/messages?beta=true", {"x-api-key": keys.api_key}),
    ("/v1/messages", {"Authorization": f"Bearer {keys.api_key}"}),
    (f"/s/{keys.api_key}/v1/messages?beta=true", {}),
  ):
    headers |= {"anthropic-beta": "a,b", "anthropic-version": "2023-06-01"}
    async with h.http.post(
      h.gateway.url + path, json=body, headers=headers
    ) as response:
      assert response.status == 200
      assert (await response.json())["role"] == "assistant"
