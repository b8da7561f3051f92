"""Efforts of reasoning, and calls that are not parallel, in Chat Completions."""

import copy
import json

import pytest

from forge_jax.gateway import refusal, render

HEAD = "{%% if %s %%}<|im_start|>system\nThink %s.<|im_end|>\n{%% endif %%}"
EFFORT = HEAD % ("reasoning_effort", "{{ reasoning_effort }}")
SWITCH = HEAD % ("enable_thinking is false", "not")
CALL = (
  '<tool_call>\n{"name": "calculate", "arguments": {"n": %d}}\n</tool_call>'
)
VISION = ("vision_start", "vision_end", "image_pad", "video_pad")


def user(text):
  return {"role": "user", "content": text}


def with_head(tokenizer, head):
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.chat_template = head + tokenizer.chat_template
  return tokenizer


async def test_an_effort_reaches_a_template_that_knows_it(
  start, tool_tokenizer
):
  h = await start(with_head(tool_tokenizer, EFFORT))
  keys = await h.open()
  h.say("one", "two", "three", "four")
  first = await h.chat(keys, [user("?")], reasoning_effort="low")
  turn = [user("?"), first["choices"][0]["message"], user("!")]
  await h.chat(keys, turn, reasoning_effort="low")
  await h.chat(keys, turn, reasoning_effort="high")
  body = {"input": "?", "reasoning": {"effort": "low"}}
  status, reply = await h.post(keys, body, "/v1/responses")
  assert (status, reply["reasoning"]["effort"]) == (200, "low")
  completions, _ = await h.admin.close_session("s")
  assert [c.parent for c in completions] == [None, "s/0", None, None]
  assert completions[2].fork_reason == "tools"
  texts = [h.text(c.prompt_ids) for c in completions]
  assert texts[0].startswith("<|im_start|>system\nThink low.")
  assert texts[2].startswith("<|im_start|>system\nThink high.")
  assert texts[3] == texts[0]


def test_no_effort_turns_thinking_off(tool_tokenizer):
  renderer = render.Renderer(with_head(tool_tokenizer, SWITCH))
  off = renderer.with_effort("none")
  assert "Think not." in off.decode(off.render([user("?")], ()).ids)
  assert renderer.with_effort("none") is off
  assert renderer.with_effort("high") is renderer


def test_a_template_without_efforts_is_left_as_it_is(smollm2):
  renderer = render.Renderer(smollm2)
  assert renderer.with_effort("high") is renderer
  assert renderer.with_effort(None) is renderer


def test_an_effort_that_a_family_does_not_know(tool_tokenizer):
  tokenizer = copy.deepcopy(tool_tokenizer)
  tokenizer.add_tokens([f"<|{name}|>" for name in VISION])
  renderer = render.Renderer(tokenizer, "qwen3.8")
  assert renderer.with_effort("low").effort == "low"
  with pytest.raises(refusal.Refusal, match="minimal") as caught:
    renderer.with_effort("minimal")
  assert caught.value.param == "reasoning_effort"


@pytest.mark.parametrize("stream", [False, True])
async def test_only_the_first_call_where_calls_are_not_parallel(
  start, tool_tokenizer, calculator, stream
):
  h = await start(tool_tokenizer)
  keys = await h.open()
  h.say(CALL % 1 + "\n" + CALL % 2, "fine")
  body = {"tools": [calculator], "parallel_tool_calls": False}
  async with h.http.post(
    h.gateway.url + "/v1/chat/completions",
    json={"model": "m", "messages": [user("?")], "stream": stream, **body},
    headers={"Authorization": f"Bearer {keys.api_key}"},
  ) as response:
    text = (await response.read()).decode()
  if stream:
    chunks = [json.loads(x[6:]) for x in text.split("\n\n")[:-2]]
    calls = [
      call
      for chunk in chunks
      for call in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
  else:
    calls = json.loads(text)["choices"][0]["message"]["tool_calls"]
  (call,) = calls
  assert json.loads(call["function"]["arguments"]) == {"n": 1}
  said = {"role": "assistant", "content": None, "tool_calls": calls}
  result = {"role": "tool", "tool_call_id": call["id"], "content": "1"}
  reply = await h.chat(keys, [user("?"), said, result], **body)
  details = reply["usage"]["prompt_tokens_details"]
  (first, second), _ = await h.admin.close_session("s")
  assert second.parent == first.id
  assert details["cached_tokens"] == (
    len(first.prompt_ids) + len(first.response_ids)
  )
