"""Content blocks, and the internal messages they become."""

import json

import pytest

from forge_jax.gateway import refusal
from forge_jax.gateway.dialects import anthropic_content

DEFINITION = {"type": "function", "function": {"name": "f", "parameters": {}}}


def read(*messages, system=None):
  return anthropic_content.conversation(system, messages, {"f": DEFINITION})


def user(*blocks):
  return {"role": "user", "content": list(blocks)}


def assistant(*blocks):
  return {"role": "assistant", "content": list(blocks)}


def text(value, **fields):
  return {"type": "text", "text": value, **fields}


def result(content, **fields):
  return {
    "type": "tool_result",
    "tool_use_id": "1",
    "content": content,
    **fields,
  }


def thinking(value, signature=""):
  return {"type": "thinking", "thinking": value, "signature": signature}


@pytest.mark.parametrize(
  "content",
  [
    "a\nb",
    [text("a\nb")],
    [text("a\nb", cache_control={"type": "ephemeral"}, citations=None)],
    [text("a"), text("\nb", cache_control=None)],
  ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_text_is_the_same_however_it_is_cut(role, content):
  assert read({"role": role, "content": content}) == [
    {"role": role, "content": "a\nb"}
  ]
  assert read(user(), system=content)[0] == {
    "role": "system",
    "content": "a\nb",
  }


@pytest.mark.parametrize(
  ("system", "shown"),
  [
    (None, None),
    ("", None),
    ([], None),
    ("x-anthropic-billing-header: v=1; c=2;", None),
    ("x-anthropic-billing-header: v=1;\nBe brief.", "Be brief."),
    (
      [text("x-anthropic-billing-header: v=1;"), text("Be brief.")],
      "Be brief.",
    ),
    (
      [text("Be brief."), text("x-anthropic-billing-header: v")],
      "Be brief.x-anthropic-billing-header: v",
    ),
  ],
)
def test_a_billing_header_is_dropped_from_the_system_prompt(system, shown):
  message = {"role": "user", "content": "hi"}
  expected = [{"role": "system", "content": shown}] if shown else []
  assert read(message, system=system) == [*expected, message]


def test_tool_results_are_messages_of_their_own_in_their_order():
  image = {"type": "image", "source": {}}
  reference = {"type": "tool_reference", "tool_name": "f"}
  assert read(
    user(
      result("plain"),
      result([text("a"), text("b"), image, text("c"), image, reference]),
      result("no such file", is_error=True),
      result([], is_error=True),
      result(None),
      text("and now?"),
    )
  ) == [
    {"role": "tool", "content": content, "tool_call_id": "1"}
    for content in (
      "plain",
      f"ab\n[image]\nc\n[image]\n{json.dumps(DEFINITION)}",
      "[error] no such file",
      "[error]",
      "",
    )
  ] + [{"role": "user", "content": "and now?"}]


def test_text_before_a_result_comes_before_it():
  roles = [m["role"] for m in read(user(text("see"), result("x"), text("so")))]
  assert roles == ["user", "tool", "user"]


def test_documents_and_search_results_are_shown_as_text():
  plain = {"type": "text", "media_type": "text/plain", "data": "body"}
  blocks = {"type": "content", "content": [text("bo"), text("dy")]}
  found = {
    "type": "search_result",
    "title": "Title",
    "source": "http://a",
    "content": [text("body")],
    "citations": {"enabled": False},
  }
  for source in (plain, blocks, {"type": "content", "content": "body"}):
    document = {"type": "document", "source": source, "title": "Title"}
    (message,) = read(user(text("Read:"), document, text("Well?")))
    assert message["content"] == "Read:\nTitle\nbody\nWell?"
  pdf = {"type": "document", "source": {"type": "base64", "data": "eA=="}}
  messages = read(user(result([found]), result([pdf])))
  assert [m["content"] for m in messages] == [
    "Title\nhttp://a\nbody",
    "[document]",
  ]


def test_an_assistant_message_of_several_blocks():
  call = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "é"}}
  blocks = [
    thinking("hm"),
    {"type": "redacted_thinking", "data": "xyz"},
    text("I "),
    {**call, "caller": {"type": "direct"}},
    text("will."),
  ]
  expected = {
    "role": "assistant",
    "content": "I will.",
    "reasoning_content": "hm",
    "tool_calls": [
      {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": "é"}'},
      }
    ],
  }
  assert read(assistant(*blocks)) == [expected]
  # The same, when an agent sends back a message per block.
  assert read(*(assistant(block) for block in blocks)) == [expected]
  assert read(assistant()) == [{"role": "assistant", "content": ""}]


def test_thinking_comes_back_by_its_signature():
  signature = anthropic_content.signature("hm, é")
  for shown in ("hm, é", "", "hm, é\n"):
    (message,) = read(assistant(thinking(shown, signature)))
    assert message["reasoning_content"] == "hm, é"
  (message,) = read(assistant(thinking("mine", "EqQBCgIYAhIM")))
  assert message["reasoning_content"] == "mine"
  for shown, signed, field in (
    ("changed", signature, "thinking"),
    ("", signature[:-3], "signature"),
    ("", "forge.%%%", "signature"),
  ):
    with pytest.raises(refusal.Refusal) as caught:
      read(assistant(thinking(shown, signed)))
    assert caught.value.param == f"messages[0].content[0].{field}"


def test_system_messages_stay_where_they_are():
  note = {"role": "system", "content": [text("note")]}
  passing = {**note, "clear_at": "next_user_message"}
  said = {"role": "assistant", "content": "ok"}
  roles = [m["role"] for m in read(user(), note, said, user(), passing)]
  assert roles == ["user", "system", "assistant", "user", "system"]
  roles = [m["role"] for m in read(user(), passing, said, user())]
  assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize(
  ("message", "param"),
  [
    ("hi", "messages[0]"),
    ({"content": "hi"}, "messages[0].role"),
    ({"role": "tool", "content": "hi"}, "messages[0].role"),
    ({"role": "user"}, "messages[0].content"),
    ({"role": "user", "content": 3}, "messages[0].content"),
    (user("hi"), "messages[0].content[0]"),
    (user({}), "messages[0].content[0].type"),
    (user({"type": "text"}), "messages[0].content[0].text"),
    (user(text("a"), {"type": "image"}), "messages[0].content[1].type"),
    (user(thinking("hm")), "messages[0].content[0].type"),
    (user({"type": "document"}), "messages[0].content[0].source"),
    (
      user({"type": "document", "source": {"type": "base64"}}),
      "messages[0].content[0].source",
    ),
    (
      user(
        {
          "type": "document",
          "source": {"type": "text", "data": ""},
          "citations": {"enabled": True},
        }
      ),
      "messages[0].content[0].citations",
    ),
    (user({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
    (
      user(result([{"type": "browser_state"}])),
      "messages[0].content[0].content[0].type",
    ),
    (
      user(result([{"type": "tool_reference", "tool_name": "g"}])),
      "messages[0].content[0].content[0].tool_name",
    ),
    (assistant({"type": "image"}), "messages[0].content[0].type"),
    (assistant({"type": "server_tool_use"}), "messages[0].content[0].type"),
    (
      assistant({"type": "tool_use", "id": "1", "name": "f", "input": "{}"}),
      "messages[0].content[0].input",
    ),
    (
      assistant({"type": "tool_use", "caller": {"type": "code"}}),
      "messages[0].content[0].caller",
    ),
    (
      {"role": "system", "content": [{"type": "image"}]},
      "messages[0].content[0].type",
    ),
    (
      {"role": "system", "content": "x", "clear_at": "noon"},
      "messages[0].clear_at",
    ),
    (
      {"role": "system", "content": "x", "output_config": {"effort": "low"}},
      "messages[0].output_config",
    ),
  ],
)
def test_what_is_refused_is_named(message, param):
  with pytest.raises(refusal.Refusal) as caught:
    read(message)
  assert caught.value.param == param
