"""OpenAI Responses through the official SDK: lineage, state, streams."""

import itertools
import json

import httpx
import openai
import pytest
import pytest_asyncio

CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
CALCULATE = CALL % ("calculate", '{"expression":  "%s"}')  # two spaces
TOOL = {
  "type": "function",
  "name": "calculate",
  "description": "Calculates.",
  "strict": False,
  "parameters": {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
  },
}
PATCH = {
  "type": "custom",
  "name": "patch",
  "description": "Edits.",
  "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"},
}
SPACE = {
  "type": "namespace",
  "name": "agents",
  "description": "Sub-agents.",
  "tools": [{"type": "function", "name": "spawn", "parameters": None}],
}


@pytest_asyncio.fixture
async def connect(start, tool_tokenizer):
  """Starts a gateway; gives it, a session's keys and an SDK client."""
  clients = []

  async def _connect(**kwargs):
    h = await start(tool_tokenizer, **kwargs)
    keys = await h.open()
    client = openai.AsyncOpenAI(
      api_key=keys.api_key,
      base_url=keys.base_url,
      http_client=httpx.AsyncClient(),
      max_retries=0,
    )
    clients.append(client)
    return h, keys, client

  yield _connect
  for client in clients:
    await client.close()


async def ask(client, stream, **body):
  """A finished response, through a stream or not."""
  if not stream:
    return await client.responses.create(model="m", **body)
  async with client.responses.stream(model="m", **body) as events:
    return await events.get_final_response()


async def check_chain(h, session="s"):
  """Each completion extends the one before it; returns them."""
  nodes = (await h.admin.forest(session))["nodes"]
  assert {node["mismatch"] for node in nodes} == {None}
  completions, _ = await h.admin.close_session(session)
  for before, after in itertools.pairwise(completions):
    seen = before.prompt_ids.tolist() + before.response_ids.tolist()
    assert after.parent == before.id
    assert after.prompt_ids.tolist()[: len(seen)] == seen
  for completion, request in zip(completions, h.requests, strict=True):
    assert completion.prompt_ids.tolist() == request.prompt_ids.tolist()
  return completions


def codex(item):
  """An item as Codex sends it back: without id, status and raw reasoning."""
  item = item.to_dict()
  for name in ("id", "status"):
    item.pop(name, None)
  if item["type"] == "reasoning":
    item["content"] = None
  return item


def as_is(item):
  return item.to_dict()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("replay", [codex, as_is])
@pytest.mark.parametrize("renderer", ["default", "qwen3"])
async def test_replayed_items_keep_every_sampled_id(
  connect, stream, replay, renderer
):
  h, _, client = await connect(renderer=renderer)
  h.say(
    "<think>\nSix  first.\n</think>\n\nI  will. " + CALCULATE % "2*3",
    CALCULATE % "6+1" + "\n" + CALCULATE % "1+6",
    "<think>\nDone.\n</think>\n\nIt is 7.",
    "Bye.",
  )
  items = [{"role": "user", "content": "What is 2*3+1?"}]
  body = {
    "instructions": "Be brief.",
    "tools": [TOOL],
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "reasoning": {"summary": "auto"} if replay is codex else {},
  }
  # Qwen3 forgets its reasoning when the user speaks again: that is a new root.
  turns = 4 if renderer == "default" else 3
  kinds = []
  for _ in range(turns):
    reply = await ask(client, stream, input=items, **body)
    kinds.append([item.type for item in reply.output])
    items += [replay(item) for item in reply.output]
    calls = [item for item in reply.output if item.type == "function_call"]
    items += [
      {"type": "function_call_output", "call_id": c.call_id, "output": "7"}
      for c in calls
    ] or [{"role": "user", "content": [{"type": "input_text", "text": "ok"}]}]
  assert (
    kinds
    == [
      ["reasoning", "message", "function_call"],
      ["function_call", "function_call"],
      ["reasoning", "message"],
      ["message"],
    ][:turns]
  )
  completions = await check_chain(h)
  assert len(completions) == turns
  assert "Be brief." in h.text(completions[0].prompt_ids)
  last = h.text(completions[-1].prompt_ids)
  assert "Six  first." in last and '{"expression":  "6+1"}' in last


@pytest.mark.parametrize("stream", [False, True])
async def test_previous_responses_are_gone_on_from(connect, stream):
  h, _, client = await connect()
  h.say(
    "I  will. " + CALCULATE % "2*3", "<think>\nh\n</think>\n\nIt is 6.", "!"
  )
  first = await ask(client, stream, input="What is 2*3?", tools=[TOOL])
  call = first.output[1]
  second = await ask(
    client,
    stream,
    input=[
      {"type": "function_call_output", "call_id": call.call_id, "output": "6"}
    ],
    previous_response_id=first.id,
    tools=[TOOL],
  )
  assert second.output_text.strip() == "It is 6."
  assert second.previous_response_id == first.id
  third = await ask(
    client,
    stream,
    input="Sure?",
    previous_response_id=second.id,
    tools=[TOOL],
  )
  assert third.usage.input_tokens_details.cached_tokens == (
    second.usage.total_tokens
  )
  await check_chain(h)


async def test_instructions_are_not_inherited(connect):
  h, _, client = await connect()
  h.say("one", "two", "three")
  first = await ask(client, False, input="a", instructions="Be brief.")
  second = await ask(client, False, input="b", previous_response_id=first.id)
  assert (first.instructions, second.instructions) == ("Be brief.", None)
  again = await ask(
    client,
    False,
    input="b",
    previous_response_id=first.id,
    instructions="Be brief.",
  )
  assert again.usage.input_tokens_details.cached_tokens > 0
  completions, _ = await h.admin.close_session("s")
  assert [c.parent for c in completions] == [None, None, "s/0"]
  assert "Be brief." not in h.text(completions[1].prompt_ids)
  assert completions[1].fork_reason == "history"


async def test_what_is_stored(connect):
  h, _, client = await connect()
  h.say("one", "two", "three", "four")
  first = await ask(client, False, input="a", metadata={"k": "v"})
  kept = await ask(client, True, input="b", previous_response_id=first.id)
  for response in (first, kept):
    same = await client.responses.retrieve(response.id)
    assert same.id == response.id and same.usage == response.usage
    assert same.output[0].id == response.output[0].id
    assert same.output_text == response.output_text
    assert same.metadata == response.metadata
  items = [item async for item in client.responses.input_items.list(kept.id)]
  assert [i.content[0].text for i in items] == ["b", "one", "a"]
  assert items[1].id == first.output[0].id
  pages = []
  page = await client.responses.input_items.list(kept.id, limit=2, order="asc")
  while True:
    pages.append([item.content[0].text for item in page.data])
    if not page.has_next_page():
      break
    page = await page.get_next_page()
  assert pages == [["a", "one"], ["b"]]
  # An item of a stored response may be named instead of repeated.
  named = await ask(
    client,
    False,
    input=[
      {"role": "user", "content": "a"},
      {"type": "item_reference", "id": first.output[0].id},
      {"role": "user", "content": "again"},
    ],
    store=False,
  )
  await client.responses.delete(first.id)
  # What followed the deleted response goes on seeing it.
  await ask(client, False, input="c", previous_response_id=kept.id)
  completions, _ = await h.admin.close_session("s")
  assert [c.parent for c in completions] == [None, "s/0", "s/0", "s/1"]
  assert named.output_text == "three"


async def test_what_is_not_stored(connect):
  h, keys, client = await connect()
  h.say("one", "two")
  hidden = await ask(client, False, input="a", store=False)
  gone = await ask(client, False, input="a")
  await client.responses.delete(gone.id)
  for id in (hidden.id, gone.id, "resp_x"):
    for call in (
      client.responses.retrieve(id),
      client.responses.delete(id),
      client.responses.input_items.list(id),
    ):
      with pytest.raises(openai.NotFoundError, match=id):
        await call
    with pytest.raises(openai.BadRequestError) as caught:
      await ask(client, False, input="b", previous_response_id=id)
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"
  reference = {"type": "item_reference", "id": hidden.output[0].id}
  with pytest.raises(openai.BadRequestError) as caught:
    await ask(client, False, input=[reference])
  assert caught.value.param == "input[0].id"
  status, _ = await h.post(None, {}, "/v1/responses/input_tokens")
  assert status == 401
  other = await h.open("other")  # a session's responses are its own
  h.say("mine")
  _, mine = await h.post(keys, {"input": "a"}, "/v1/responses")
  async with h.http.get(
    f"{h.gateway.url}/v1/responses/{mine['id']}",
    headers={"Authorization": f"Bearer {other.api_key}"},
  ) as response:
    assert response.status == 404


SAID = [
  "Naïve café: 日本語 🙂!",
  "Let me see. " + CALCULATE % "1+1",
  CALCULATE % "1" + "\n" + CALCULATE % "2",
  "<think>\nhm, 1?\n</think>\n\nThe answer is 1.",
  "<think>\nhm\n</think>\n\n" + CALCULATE % "1",
  "<think>\nonly this",
  "  two spaces, then text  ",
  CALCULATE[:-3] % "broken",
  CALL % ("patch", '{"input": "*** a\\n\\"b\\""}'),
  CALL % ("agents.spawn", "{}"),
  "",
]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("summary", [None, "auto"])
async def test_streamed_and_whole_replies_are_the_same(connect, said, summary):
  h, keys, client = await connect(delay=0.0001)
  h.say(said, said)
  body = {
    "model": "m",
    "input": "?",
    "tools": [TOOL, PATCH, SPACE],
    "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    "reasoning": {"summary": summary},
  }
  status, whole = await h.post(keys, body, "/v1/responses")
  assert status == 200
  events = []
  async for event in await client.responses.create(stream=True, **body):
    events.append(event.to_dict())
  assert [e["sequence_number"] for e in events] == list(range(len(events)))
  last = events[-1]
  assert last["type"] == "response.completed"
  assert _plain(last["response"]) == _plain(whole)
  _check_order(events)
  (a, b), _ = await h.admin.close_session("s")
  assert a.response_ids.tolist() == b.response_ids.tolist()


def _plain(response):
  """A response without what differs between two that say the same."""
  text = json.dumps({k: v for k, v in response.items() if "_at" not in k})
  for kind in ("resp_", "rs_", "msg_", "fc_", "ctc_"):
    text = text.replace(kind + response["id"].removeprefix("resp_"), kind)
  value = json.loads(text)
  for item in value["output"]:
    item.pop("call_id", None)
    for part in item.get("content", []):
      for token in part.get("logprobs") or ():
        token.pop("logprob")  # made up from the request's seed
  return value


def _check_order(events):
  """The events spell the response, in the order of the protocol."""
  kinds = [e["type"].removeprefix("response.") for e in events]
  assert kinds[:2] == ["created", "in_progress"]
  spelled, k = [], 2
  for item in events[-1]["response"]["output"]:
    added = events[k]
    assert kinds[k] == "output_item.added"
    assert added["item"]["id"] == item["id"]
    text, parts = (
      "",
      {
        "message": ("content_part", "output_text"),
        "function_call": (None, "function_call_arguments"),
        "custom_tool_call": (None, "custom_tool_call_input"),
        "reasoning": (
          ("reasoning_summary_part", "reasoning_summary_text")
          if item.get("summary")
          else ("content_part", "reasoning_text")
        ),
      }[item["type"]],
    )
    part, name = parts
    k += 1
    if part:
      assert kinds[k] == f"{part}.added" and events[k]["part"]["text"] == ""
      k += 1
    while kinds[k] == f"{name}.delta":
      assert events[k]["item_id"] == item["id"]
      assert events[k]["output_index"] == len(spelled)
      text += events[k]["delta"]
      k += 1
    assert kinds[k] == f"{name}.done"
    done = events[k]
    k += 1
    if part:
      assert kinds[k] == f"{part}.done" and events[k]["part"]["text"] == text
      k += 1
    assert kinds[k] == "output_item.done" and events[k]["item"] == item
    k += 1
    field = {"function_call": "arguments", "custom_tool_call": "input"}
    assert done[field.get(item["type"], "text")] == text
    if item["type"] == "message":
      assert text == item["content"][0]["text"]
    elif item["type"] == "reasoning":
      shown = item.get("content") or item["summary"]
      assert text == shown[0]["text"]
    spelled.append(text)
  assert k == len(events) - 1


async def test_text_is_streamed_as_it_is_sampled(connect):
  h, _, client = await connect(delay=0.001)
  h.say("one two three four five six")
  pieces = []
  async for event in await client.responses.create(
    model="m", input="?", stream=True
  ):
    if event.type == "response.output_text.delta":
      pieces.append(event.delta)
  assert len(pieces) >= 5
  assert "".join(pieces) == "one two three four five six"


@pytest.mark.parametrize("stream", [False, True])
async def test_custom_and_namespaced_tools(connect, stream):
  h, _, client = await connect()
  odd = '{"input": 3, "file":  "x"}'
  h.say(
    CALL % ("patch", '{"input":  "line\\n\\"q\\""}'),
    CALL % ("patch", odd),
    CALL % ("agents.spawn", "{}"),
    CALL % ("agents.spawn", '{"a": 1}'),
    "done",
  )
  items = [{"role": "user", "content": "go"}]
  for _ in range(5):
    reply = await ask(
      client, stream, input=items, tools=[TOOL, PATCH, SPACE], store=False
    )
    items.append(codex(reply.output[0]))
    output = {"call_id": items[-1].get("call_id"), "output": "ok"}
    kind = items[-1]["type"]
    items.append({"type": f"{kind}_output", **output})
  calls = items[1:8:2]
  assert calls[0]["type"] == "custom_tool_call"
  assert (calls[0]["name"], calls[0]["input"]) == ("patch", 'line\n"q"')
  assert json.loads(calls[1]["input"]) == json.loads(odd)
  assert calls[2]["type"] == "function_call"
  assert (calls[2]["namespace"], calls[2]["name"]) == ("agents", "spawn")
  completions = await check_chain(h)
  prompt = h.text(completions[0].prompt_ids)
  assert "start: /x/" in prompt and '"agents.spawn"' in prompt
  assert "Sub-agents." in prompt


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_is_cut(connect, stream):
  h, _, client = await connect()
  h.say("one two three four", "<think>\none two three four", "ok")
  cut = await ask(client, False, input="?", max_output_tokens=3)
  assert cut.status == "incomplete"
  assert cut.incomplete_details.reason == "max_output_tokens"
  assert cut.output[0].status == "incomplete"
  events = [
    event
    async for event in await client.responses.create(
      model="m", input="?", max_output_tokens=3, stream=True
    )
  ]
  assert events[-1].type == "response.incomplete"
  (item,) = events[-1].response.output
  assert (item.type, item.status) == ("reasoning", "incomplete")
  go_on = [{"role": "user", "content": "?"}, as_is(item)]
  await ask(client, stream, input=[*go_on, {"role": "user", "content": "!"}])
  completions, _ = await h.admin.close_session("s")
  assert completions[2].parent == completions[1].id


async def test_a_stream_that_fails_says_so(connect):
  h, _, client = await connect(delay=0.01)
  h.say("word " * 100)
  events = []
  async for event in await client.responses.create(
    model="m", input="?", stream=True
  ):
    events.append(event)
    if len(events) == 5:
      await h.admin.close_session("s")
  assert events[-1].type == "response.failed"
  assert events[-1].response.error.code == "server_error"
  assert "aborted" in events[-1].response.error.message
  numbers = [event.sequence_number for event in events]
  assert numbers == list(range(len(events)))


async def test_a_prompt_over_the_context(connect):
  _, _, client = await connect(max_context=64)
  for stream in (False, True):
    with pytest.raises(openai.BadRequestError) as caught:
      await ask(client, stream, input="long " * 100)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "input"


async def test_input_tokens_are_those_of_the_prompt(connect):
  h, _, client = await connect()
  h.say("one")
  body = {"input": "hello", "instructions": "Be brief.", "tools": [TOOL]}
  count = await client.responses.input_tokens.count(model="m", **body)
  reply = await ask(client, False, **body)
  assert count.input_tokens == reply.usage.input_tokens
  more = await client.responses.input_tokens.count(
    input="more", previous_response_id=reply.id, tools=[TOOL]
  )
  assert more.object == "response.input_tokens"
  assert more.input_tokens > 0
  assert (await h.admin.forest("s"))["nodes"][2:] == []  # nothing was planned


async def test_logprobs_and_reasoning_tokens(connect):
  h, _, client = await connect()
  h.say("<think>\nhm\n</think>\n\nYes.")
  reply = await ask(
    client, False, input="?", include=["message.output_text.logprobs"]
  )
  (completion,), _ = await h.admin.close_session("s")
  said = reply.output[1].content[0].logprobs
  assert [t.logprob for t in said] == completion.logprobs.tolist()
  assert "".join(t.token for t in said) == h.text(completion.response_ids)
  ids = completion.response_ids.tolist()
  end = h.tokenizer.convert_tokens_to_ids("</think>")
  assert reply.usage.output_tokens == len(ids)
  assert reply.usage.output_tokens_details.reasoning_tokens == (
    ids.index(end) + 1
  )


async def test_only_the_first_call_where_calls_are_not_parallel(connect):
  h, _, client = await connect()
  h.say(CALCULATE % "1" + "\n" + CALCULATE % "2", "fine")
  body = {"tools": [TOOL], "parallel_tool_calls": False}
  first = await ask(client, False, input="?", **body)
  (call,) = first.output
  assert json.loads(call.arguments) == {"expression": "1"}
  output = {"type": "function_call_output", "output": "1"}
  await ask(
    client,
    True,
    input=[{**output, "call_id": call.call_id}],
    previous_response_id=first.id,
    **body,
  )
  await check_chain(h)


async def test_a_request_as_codex_sends_it(connect):
  h, _, client = await connect()
  h.say(CALL % ("shell", '{"command": ["ls"]}'), "done")
  shell = {**TOOL, "name": "shell", "strict": False}
  image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
  items = [
    {
      "type": "message",
      "role": role,
      "content": [{"type": "input_text", "text": text}],
    }
    for role, text in (("developer", "Sandbox: none."), ("user", "ls"))
  ]
  body = {
    "instructions": "You are Codex.",
    "tools": [
      shell,
      PATCH,
      SPACE,
      {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "text": {"verbosity": "low"},
    "extra_body": {"client_metadata": {"session": "0199"}},
  }
  reply = await ask(client, True, input=items, **body)
  assert [tool.type for tool in reply.tools] == [
    "function",
    "custom",
    "namespace",
  ]
  call = codex(reply.output[0])
  output = [{"type": "input_text", "text": "a.txt"}, image]
  items += [
    call,
    {
      "type": "function_call_output",
      "call_id": call["call_id"],
      "output": output,
    },
  ]
  await ask(client, True, input=items, **body)
  completions = await check_chain(h)
  prompt = h.text(completions[1].prompt_ids)
  assert "Sandbox: none." in prompt and "a.txt[image]" in prompt
