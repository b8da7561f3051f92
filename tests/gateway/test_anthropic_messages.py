"""Requests of the Messages protocol: what they ask for, what is refused."""

import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax import errors
from forge_jax.gateway import refusal
from forge_jax.gateway.dialects import anthropic_errors, anthropic_messages

BASE = {
  "model": "m",
  "max_tokens": 9,
  "messages": [{"role": "user", "content": "hi"}],
}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


def turn(**change):
  return anthropic_messages.parse({**BASE, **change}).turns[0]


def test_everything_that_is_honoured():
  request = anthropic_messages.parse(
    {
      **BASE,
      "temperature": 0,
      "top_p": 0.5,
      "top_k": 3,
      "stop_sequences": ["X"],
      "stream": True,
      "tools": [{**TOOL, "type": "custom", "cache_control": {}}],
      "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
      "output_config": {"effort": "low"},
      "thinking": {"type": "adaptive", "display": "omitted"},
    }
  )
  (turn,) = request.turns
  assert (turn.max_tokens, turn.temperature, turn.top_p) == (9, 0, 0.5)
  assert (turn.top_k, turn.stop, turn.seed) == (3, ("X",), None)
  assert turn.tools == ({"type": "function", "function": FUNCTION},)
  assert turn.hidden_tools == ()
  assert not turn.parallel_tool_calls
  assert turn.reasoning_effort == "low"
  assert request.stream
  assert (request.style.model, request.style.max_tokens) == ("m", 9)
  assert not request.style.show_thinking


def test_what_is_not_asked_for_is_left_open():
  request = anthropic_messages.parse(BASE)
  (turn,) = request.turns
  assert turn.temperature is turn.top_p is turn.top_k is None
  assert turn.stop == turn.tools == turn.hidden_tools == ()
  assert turn.parallel_tool_calls and turn.reasoning_effort is None
  assert request.style.show_thinking and not request.stream


def test_what_an_agent_sends_for_its_accounts_changes_nothing():
  asked = turn(
    metadata={"user_id": "u"},
    service_tier="auto",
    cache_control={"type": "ephemeral"},
    context_management={
      "edits": [{"type": "clear_thinking_20251015", "keep": "all"}]
    },
    betas=["interleaved-thinking-2025-05-14"],
    diagnostics={"previous_message_id": None},
    fallbacks="default",
    speed="fast",
    thinking={"type": "enabled", "budget_tokens": 1024},
    system=None,
  )
  assert asked == turn()


def test_thinking_that_is_disabled_outweighs_an_effort():
  asked = turn(thinking={"type": "disabled"}, output_config={"effort": "high"})
  assert asked.reasoning_effort == "none"


def test_tool_choice_none_takes_the_tools_away():
  tools = [TOOL, {**TOOL, "name": "g", "defer_loading": True}]
  asked = turn(tools=tools, tool_choice={"type": "none"})
  assert asked.tools == asked.hidden_tools == ()


def test_tools_in_the_form_that_templates_show():
  tools = [
    {
      **TOOL,
      "description": "d",
      "strict": False,
      "allowed_callers": ["direct"],
      "eager_input_streaming": True,
      "input_examples": [{"a": 1}],
    },
    {**TOOL, "name": "later", "defer_loading": True},
  ]
  asked = turn(tools=tools)
  assert [t["function"] for t in asked.tools] == [
    {
      "name": "f",
      "description": "d",
      "parameters": {"type": "object", "examples": [{"a": 1}]},
    }
  ]
  assert [t["function"]["name"] for t in asked.hidden_tools] == ["later"]


@pytest.mark.parametrize(
  ("change", "param"),
  [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "I"}]}, "messages"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_p": -1}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": -1}, "top_k"),
    ({"stop_sequences": "X"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stream": 1}, "stream"),
    ({"system": 3}, "system"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {}}, "thinking.type"),
    ({"thinking": "enabled"}, "thinking"),
    (
      {"thinking": {"type": "adaptive", "display": "x"}},
      "thinking.display",
    ),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    (
      {"output_config": {"format": {"type": "json_schema"}}},
      "output_config.format.schema",
    ),
    ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
    ({"tools": "f"}, "tools"),
    ({"tools": ["f"]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    (
      {"tools": [{"type": "web_search_20260318", "name": "web_search"}]},
      "tools[0].type",
    ),
    ({"tools": [{**TOOL, "strict": 1}]}, "tools[0].strict"),
    ({"output_format": {"type": "json"}}, "output_format.type"),
    ({"tools": [{**TOOL, "new_option": 1}]}, "tools[0].new_option"),
    (
      {"tools": [{**TOOL, "allowed_callers": ["code_execution_20260120"]}]},
      "tools[0].allowed_callers",
    ),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools"),
    ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": "auto"}, "tool_choice"),
    (
      {"context_management": {"edits": [{"type": "compact_20260112"}]}},
      "context_management.edits[0]",
    ),
    (
      {
        "context_management": {
          "edits": [
            {"type": "clear_thinking_20251015"},
            {"type": "clear_tool_uses_20250919"},
          ]
        }
      },
      "context_management.edits[1]",
    ),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"thread": {}}, "thread"),
    ({"compaction": {"type": "summarize"}}, "compaction"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"n": 2}, "n"),
  ],
)
def test_what_is_refused_is_named(change, param):
  with pytest.raises(refusal.Refusal) as caught:
    anthropic_messages.parse({**BASE, **change})
  assert caught.value.param == param
  assert str(caught.value).startswith(param)
  status, body = anthropic_messages.error(caught.value)
  assert status == 400
  assert body["type"] == "error"
  assert body["error"]["type"] == "invalid_request_error"
  assert param in body["error"]["message"]


@pytest.mark.parametrize(
  ("failure", "status", "kind"),
  [
    (refusal.Refusal("x"), 400, "invalid_request_error"),
    (refusal.Refusal("x", status=401), 401, "authentication_error"),
    (refusal.Refusal("x", status=404), 404, "not_found_error"),
    (refusal.Refusal("x", status=413), 413, "request_too_large"),
    (refusal.Refusal("x", status=405), 405, "invalid_request_error"),
    (refusal.Refusal("x", status=503), 503, "api_error"),
    (errors.EngineError("x"), 500, "api_error"),
    (errors.ContextOverflowError("x"), 400, "invalid_request_error"),
    (RuntimeError("a secret"), 500, "api_error"),
  ],
)
def test_what_a_failure_tells(failure, status, kind):
  told, body = anthropic_errors.error(failure)
  assert (told, body["error"]["type"]) == (status, kind)
  assert "secret" not in body["error"]["message"]
  overflow = isinstance(failure, errors.ContextOverflowError)
  assert overflow == body["error"]["message"].startswith("prompt is too long")


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
          "thinking",
          "signature",
          "name",
          "input",
          "id",
          "source",
          "data",
          "tool_use_id",
          "tool_name",
          "is_error",
          "caller",
          "citations",
          "title",
          "edits",
        ]
      ),
      inner
      | st.sampled_from(
        [
          "text",
          "thinking",
          "tool_use",
          "tool_result",
          "tool_reference",
          "image",
          "document",
          "search_result",
          "redacted_thinking",
          "content",
        ]
      ),
      max_size=5,
    )
  ),
  max_leaves=12,
)
NAMES = sorted(anthropic_messages._KNOWN | {"n"})


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  change=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3),
  roles=st.lists(st.sampled_from(["user", "assistant", "system", "x"])),
  field=JSON,
)
def test_any_json_is_read_or_refused(change, roles, field):
  messages = [{"role": r, "content": field} for r in roles]
  for body in ({**BASE, **change}, {**BASE, "messages": messages}, field):
    try:
      anthropic_messages.parse(body)
    except refusal.Refusal as refused:
      assert anthropic_messages.error(refused)[0] == 400
