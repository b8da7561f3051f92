"""What a Responses request may hold: honoured, brought to one form, refused."""

import base64

import hypothesis
from hypothesis import strategies as st
from openai.types import responses
import pytest

from forge_jax.gateway import refusal, sessions, stored
from forge_jax.gateway.dialects import openai_responses, openai_responses_input

BASE = {"model": "m", "input": "hi"}
TOOL = {"type": "function", "name": "f", "strict": True, "parameters": {}}
CUSTOM = {"type": "custom", "name": "c", "format": {"type": "text"}}
USER = {"type": "message", "role": "user", "content": "hi"}
FOREIGN = base64.urlsafe_b64encode(b"not ours").decode()


def parse(**change):
  session = sessions.Session("s", 1, {"temperature": 0.5})
  return openai_responses.parse({**BASE, **change}, session)


def said(*items):
  return parse(input=list(items)).turns[0].messages


def call(name, arguments, id="c1"):
  function = {"name": name, "arguments": arguments}
  return {"id": id, "type": "function", "function": function}


def test_everything_that_is_honoured():
  request = parse(
    max_output_tokens=7,
    temperature=0,
    top_p=0.5,
    stream=True,
    stream_options={"include_obfuscation": True},
    store=False,
    parallel_tool_calls=False,
    reasoning={"effort": "low", "summary": "detailed", "context": "auto"},
    include=["reasoning.encrypted_content", "file_search_call.results"],
    text={"format": {"type": "text"}, "verbosity": "high"},
    tools=[TOOL, CUSTOM],
    tool_choice="auto",
    truncation="disabled",
    background=False,
    top_logprobs=0,
    previous_response_id=None,
    service_tier="flex",
    metadata={"a": "b"},
  )
  (turn,) = request.turns
  assert (turn.max_tokens, turn.temperature, turn.top_p) == (7, 0, 0.5)
  assert turn.reasoning_effort == "low" and not turn.parallel_tool_calls
  assert request.stream and not request.store
  assert request.form.summary and request.form.sealed
  assert not request.form.logprobs
  string = {"type": "object", "properties": {"input": {"type": "string"}}}
  assert turn.tools == (
    {
      "type": "function",
      "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {}},
      },
    },
    {
      "type": "function",
      "function": {
        "name": "c",
        "parameters": {**string, "required": ["input"]},
      },
    },
  )


def test_what_is_not_asked_for_is_left_open():
  request = parse()
  (turn,) = request.turns
  assert turn.max_tokens is turn.temperature is turn.top_p is turn.seed is None
  assert turn.tools == () and turn.parallel_tool_calls
  assert request.store and not request.stream
  assert request.echo["temperature"] == 0.5  # the session's
  assert request.echo["top_p"] == 1.0


def test_tool_choice_none_takes_the_tools_away():
  request = parse(tools=[TOOL], tool_choice="none")
  assert request.turns[0].tools == ()
  assert request.echo["tools"] == [TOOL]


def test_messages_are_brought_to_one_form():
  parts = [{"type": "input_text", "text": t} for t in "ab"]
  assert parse(instructions="Be brief.").turns[0].messages == [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
  ]
  assert said(
    {"role": "developer", "content": "x"},
    {"role": "user", "content": parts},
    {"role": "assistant", "content": "easy"},
    {"type": "function_call_output", "call_id": "1", "output": parts},
  ) == [
    {"role": "system", "content": "x"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "easy"},
    {"role": "tool", "tool_call_id": "1", "content": "ab"},
  ]


def test_the_items_of_a_turn_are_one_message():
  reasoning = {
    "type": "reasoning",
    "id": "rs",
    "summary": [{"type": "summary_text", "text": "hm"}],
    "content": None,
  }
  message = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "t", "annotations": []}],
  }
  function = {"type": "function_call", "call_id": "c1", "name": "f"}
  function["arguments"] = "{}"
  custom = {"type": "custom_tool_call", "call_id": "c2", "name": "n"}
  custom |= {"namespace": "s", "input": 'é"'}
  turn = {
    "role": "assistant",
    "content": "t",
    "reasoning_content": "hm",
    "tool_calls": [
      call("f", "{}"),
      call("s.n", '{"input": "é\\""}', "c2"),
    ],
  }
  assert said(USER, reasoning, message, function, custom) == [
    {"role": "user", "content": "hi"},
    turn,
  ]
  # What would come earlier in a turn begins another.
  plain = {"role": "assistant", "content": "t"}
  assert said(message, message) == [plain, plain]
  assert said(function, message) == [
    {"role": "assistant", "content": "", "tool_calls": [call("f", "{}")]},
    plain,
  ]
  thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
  assert said(reasoning, reasoning) == [thought, thought]
  assert said(reasoning, USER, function) == [
    thought,
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [call("f", "{}")]},
  ]


def item(**change):
  return {"input": [change]}


@pytest.mark.parametrize(
  ("change", "param"),
  [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["hi"]}, "input[0]"),
    (item(type="message", role="tool", content=""), "input[0].role"),
    (item(role="user"), "input[0].content"),
    (
      item(role="user", content=[{"type": "input_image"}]),
      "input[0].content[0]",
    ),
    (
      item(role="user", content=[{"type": "input_file"}]),
      "input[0].content[0]",
    ),
    (
      item(role="user", content=[{"type": "output_text"}]),
      "input[0].content[0]",
    ),
    (
      item(role="user", content=[{"type": "input_text"}]),
      "input[0].content[0].text",
    ),
    (item(type="web_search_call", id="1"), "input[0].type"),
    (item(type="compaction", encrypted_content="x"), "input[0].type"),
    (item(type={}), "input[0].type"),
    (item(type="item_reference"), "input[0].id"),
    (item(id="msg_1"), "input[0].id"),
    (item(type="function_call", name="f", arguments=""), "input[0].call_id"),
    (
      item(type="function_call", call_id="1", name="f", arguments={}),
      "input[0].arguments",
    ),
    (
      item(type="custom_tool_call", call_id="1", name="f"),
      "input[0].input",
    ),
    (item(type="function_call_output", call_id="1"), "input[0].output"),
    (item(type="function_call_output", output=""), "input[0].call_id"),
    (
      item(type="reasoning", encrypted_content=FOREIGN),
      "input[0].encrypted_content",
    ),
    (
      item(type="reasoning", encrypted_content="forge-reasoning-é"),
      "input[0].encrypted_content",
    ),
    (item(type="reasoning", summary=["x"]), "input[0].summary[0]"),
    ({"instructions": ["x"]}, "instructions"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"include": ["everything"]}, "include"),
    ({"include": [[]]}, "include"),
    ({"reasoning": {"effort": "lots"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
    ({"reasoning": {"context": "current_turn"}}, "reasoning.context"),
    ({"reasoning": {"budget": 3}}, "reasoning.budget"),
    ({"text": {"format": {"type": "json"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
    (
      {"text": {"format": {"type": "json_schema", "name": "n"}}},
      "text.format.schema",
    ),
    ({"text": {"verbosity": "loud"}}, "text.verbosity"),
    ({"text": {"font": "serif"}}, "text.font"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": -1}, "top_p"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"store": "yes"}, "store"),
    ({"stream": 1}, "stream"),
    (
      {"stream_options": {"include_usage": True}},
      "stream_options.include_usage",
    ),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"user": 3}, "user"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "shell"}}, "tool_choice.type"),
    ({"tools": ["f"]}, "tools[0]"),
    ({"tools": [{"type": "file_search"}]}, "tools[0]"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{**TOOL, "parameters": "x"}]}, "tools[0].parameters"),
    (
      {"tools": [{**CUSTOM, "format": {"type": "grammar"}}]},
      "tools[0].format",
    ),
    ({"tools": [TOOL, TOOL]}, "tools[1]"),
    (
      {"tools": [{"type": "namespace", "name": "n", "tools": [{}]}]},
      "tools[0].tools",
    ),
  ],
)
def test_what_is_refused_is_named(change, param):
  with pytest.raises(refusal.Refusal) as caught:
    parse(**change)
  assert caught.value.param == param
  assert str(caught.value).startswith(param)
  status, body = openai_responses.error(caught.value)
  assert status == 400
  assert body["error"]["type"] == "invalid_request_error"


def test_whatever_is_accepted_can_be_shown():
  texts = [{"type": t, "text": "x"} for t in ("text", "output_text")]
  image = {"type": "input_image", "image_url": "data:,"}
  check_can_be_shown(
    parse(
      input=[
        {"role": "user", "content": texts[:1]},
        {"role": "assistant", "content": texts},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]},
        {"type": "reasoning", "content": [{"type": "text", "text": "x"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": ""},
        {"type": "custom_tool_call", "call_id": "2", "name": "f", "input": ""},
        {
          "type": "function_call_output",
          "call_id": "1",
          "output": [*texts, image],
        },
        {"type": "custom_tool_call_output", "call_id": "2", "output": [image]},
      ],
      tools=[TOOL, CUSTOM, {"type": "namespace", "name": "n", "tools": []}],
      reasoning={"effort": "high", "generate_summary": "concise"},
      text={"verbosity": "low"},
      max_tool_calls=3,
    )
  )


def test_an_input_is_not_needed_beside_instructions():
  messages = parse(input=None, instructions="Go.").turns[0].messages
  assert messages == [{"role": "system", "content": "Go."}]


@hypothesis.given(st.text())
def test_sealed_reasoning_comes_back(text):
  sealed = openai_responses_input.seal(text)
  item = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
  items = openai_responses_input.read([item], None)
  (message,) = openai_responses_input.messages(items, None)
  assert message["reasoning_content"] == text


KINDS = [
  "message",
  "reasoning",
  "function_call",
  "custom_tool_call",
  "function_call_output",
  "item_reference",
  "user",
  "assistant",
  "input_text",
  "input_image",
  "summary_text",
  "function",
  "custom",
  "namespace",
  "grammar",
  "text",
]
KEYS = [
  "type",
  "role",
  "content",
  "text",
  "id",
  "call_id",
  "name",
  "input",
  "arguments",
  "output",
  "summary",
  "encrypted_content",
  "namespace",
  "tools",
  "parameters",
  "format",
  "description",
  "effort",
]
JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=5)
  | st.sampled_from(KINDS),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(KEYS),
      inner,
      max_size=5,
    )
  ),
  max_leaves=15,
)
NAMES = [
  "model",
  "input",
  "instructions",
  "previous_response_id",
  "tools",
  "tool_choice",
  "text",
  "reasoning",
  "include",
  "metadata",
  "stream_options",
  "temperature",
  "store",
]


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  change=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3),
  items=st.lists(JSON, max_size=3),
  field=JSON,
)
def test_any_json_is_read_or_refused(change, items, field):
  session = sessions.Session("s", 1, {})
  for body in (
    {**BASE, **change},
    {**BASE, "input": items},
    {**BASE, "tools": items},
    field,
  ):
    try:
      request = openai_responses.parse(body, session)
    except refusal.Refusal as refused:
      assert openai_responses.error(refused)[0] == 400
    else:
      check_can_be_shown(request)


def check_can_be_shown(request):
  """What was accepted can be repeated in a response and listed as items."""
  responses.Response.model_validate(
    {
      **{"id": "r", "object": "response", "created_at": 0, "output": []},
      **request.echo,
    }
  )
  items = stored.with_ids(request.items, "item")
  ends = {"first_id": "", "last_id": "", "has_more": False, "object": "list"}
  responses.ResponseItemList.model_validate({"data": items, **ends})
