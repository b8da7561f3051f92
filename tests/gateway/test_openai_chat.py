import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax import errors
from forge_jax.gateway import refusal
from forge_jax.gateway.dialects import openai_chat

BASE = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


def test_everything_that_is_honoured():
  request = openai_chat.parse(
    {
      **BASE,
      "max_tokens": 9,
      "max_completion_tokens": 7,
      "temperature": 0,
      "top_p": 0.5,
      "seed": 11,
      "stop": "X",
      "stream": True,
      "stream_options": {"include_usage": True},
      "logprobs": True,
      "tools": [TOOL],
      "tool_choice": "auto",
      "return_token_ids": True,
      "n": 1,
      "user": "someone",
      "frequency_penalty": None,
      "presence_penalty": 0.0,
      "response_format": {"type": "text"},
      "reasoning_effort": "low",
      "parallel_tool_calls": False,
    }
  )
  turn = request.turns[0]
  assert (turn.max_tokens, turn.temperature, turn.top_p) == (7, 0, 0.5)
  assert (turn.seed, turn.stop, turn.tools) == (11, ("X",), (TOOL,))
  assert request.stream and request.include_usage and request.logprobs
  assert request.return_token_ids
  assert (turn.reasoning_effort, turn.parallel_tool_calls) == ("low", False)


def test_what_is_not_asked_for_is_left_open():
  turn = openai_chat.parse(BASE).turns[0]
  assert turn.max_tokens is turn.temperature is turn.top_p is turn.seed is None
  assert turn.stop == turn.tools == ()


def test_tool_choice_none_takes_the_tools_away():
  body = {**BASE, "tools": [TOOL], "tool_choice": "none"}
  assert openai_chat.parse(body).turns[0].tools == ()


@pytest.mark.parametrize(
  ("change", "param"),
  [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (
      {
        "messages": [
          {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
        ]
      },
      "messages[0].content[0]",
    ),
    (
      {"messages": [{"role": "tool", "content": "x"}]},
      "messages[0].tool_call_id",
    ),
    (
      {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
      "messages[0].tool_calls[0]",
    ),
    (
      {
        "messages": [
          {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f"}}],
          }
        ]
      },
      "messages[0].tool_calls[0].function.arguments",
    ),
    ({"n": 0}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.0}, "max_tokens"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"seed": -1}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": ["", "a"]}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"chunks": 1}}, "stream_options.chunks"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    (
      {"tools": [{"type": "function", "function": {}}]},
      "tools[0].function.name",
    ),
    ({"tool_choice": "never"}, "tool_choice"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    (
      {"tool_choice": {"type": "function", "function": {}}},
      "tool_choice.function.name",
    ),
    (
      {
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}
      },
      "tool_choice.allowed_tools.mode",
    ),
    (
      {
        "tool_choice": {
          "type": "allowed_tools",
          "allowed_tools": {"mode": "auto", "tools": []},
        }
      },
      "tool_choice.allowed_tools.tools",
    ),
    ({"parallel_tool_calls": 0}, "parallel_tool_calls"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    (
      {"response_format": {"type": "json_schema"}},
      "response_format.json_schema",
    ),
    (
      {"response_format": {"type": "json_schema", "json_schema": {}}},
      "response_format.json_schema.name",
    ),
    (
      {
        "response_format": {
          "type": "json_schema",
          "json_schema": {"name": "n", "schema": []},
        }
      },
      "response_format.json_schema.schema",
    ),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": "a"}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": -1}, "top_k"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"functions": []}, "functions"),
    ({"reasoning_effort": "lots"}, "reasoning_effort"),
  ],
)
def test_what_is_refused_is_named(change, param):
  with pytest.raises(refusal.Refusal) as caught:
    openai_chat.parse({**BASE, **change})
  assert caught.value.param == param
  assert str(caught.value).startswith(param)
  status, body = openai_chat.error(caught.value)
  assert status == 400
  assert body["error"]["param"] == param
  assert body["error"]["type"] == "invalid_request_error"


def test_messages_are_brought_to_one_form():
  messages = [
    {"role": "developer", "content": "be brief"},
    {
      "role": "user",
      "content": [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "cache_control": {}},
      ],
    },
    {
      "role": "assistant",
      "content": None,
      "refusal": None,
      "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": "{}"}, "index": 0}
      ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "c"},
  ]
  turn = openai_chat.parse({**BASE, "messages": messages}).turns[0]
  function = {"name": "f", "arguments": "{}"}
  assert turn.messages == [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "ab"},
    {
      "role": "assistant",
      "content": "",
      "tool_calls": [{"id": "1", "type": "function", "function": function}],
    },
    {"role": "tool", "content": "c", "tool_call_id": "1"},
  ]


def test_what_a_failure_tells():
  status, body = openai_chat.error(errors.EngineError("the engine stopped"))
  assert (status, body["error"]["message"]) == (500, "the engine stopped")
  status, body = openai_chat.error(RuntimeError("a secret"))
  assert status == 500
  assert "secret" not in body["error"]["message"]


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        [
          "role",
          "content",
          "type",
          "text",
          "tool_calls",
          "function",
          "name",
          "arguments",
          "id",
          "parameters",
        ]
      ),
      inner,
      max_size=4,
    )
  ),
  max_leaves=12,
)
NAMES = sorted(
  {*BASE, "n", "seed", "stop", "stream", "stream_options", "temperature"}
  | {"tool_choice", "tools", "max_tokens", "logprobs", "response_format"}
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  change=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3),
  roles=st.lists(st.sampled_from(["user", "assistant", "tool", "x"])),
  field=JSON,
)
def test_any_json_is_read_or_refused(change, roles, field):
  messages = [
    {"role": r, "content": field, "tool_calls": field, "tool_call_id": "1"}
    for r in roles
  ]
  for body in ({**BASE, **change}, {**BASE, "messages": messages}, field):
    try:
      openai_chat.parse(body)
    except refusal.Refusal as refused:
      assert openai_chat.error(refused)[0] == 400
