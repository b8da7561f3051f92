import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax.gateway import render, stream

PIECES = st.sampled_from(
  [
    "Hello",
    " world",
    "日本",
    "🙂",
    "\n",
    "  ",
    "END",
    "EN",
    "<think>",
    "</think>",
    "<tool_call>",
    '{"name": "calculate", "arguments": {}}',
    "</tool_call>",
    "<|im_end|>",
    "é",
  ]
)


def stream_all(renderer, prompt, ids, sizes, tools, stop):
  """Feeds ids in chunks; returns (streamed before the end, stream, reply)."""
  text = stream.TextStream(renderer, prompt, tools, stop)
  start = 0
  while start < len(ids):
    size = sizes[start % len(sizes)]
    text.feed(ids[start : start + size])
    start += size
  reply = renderer.parse(prompt, ids, tools)
  content = stream.cut(reply.content, stop)
  before = text.content
  text.finish(render.Reply(content, reply.reasoning))
  return before, text, render.Reply(content, reply.reasoning)


@hypothesis.settings(
  max_examples=150,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  pieces=st.lists(PIECES, max_size=10),
  cut=st.integers(0, 3),
  sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
  with_tools=st.booleans(),
  with_stop=st.booleans(),
)
@pytest.mark.parametrize("name", ["default", "qwen3"])
def test_the_pieces_sent_are_the_reply(
  tool_tokenizer, calculator, name, pieces, cut, sizes, with_tools, with_stop
):
  renderer = render.Renderer(tool_tokenizer, name)
  tools = [calculator] if with_tools else []
  stop = ("END",) if with_stop else ()
  asked = [{"role": "user", "content": "hi"}]
  prompt = renderer.render(asked, tools).ids
  ids = tool_tokenizer.encode("".join(pieces), add_special_tokens=False)
  ids = ids[: len(ids) - cut] if cut else ids
  ids = ids[: len(renderer.before_stop(ids)) + 1]  # where an engine ends
  _, text, reply = stream_all(renderer, prompt, ids, sizes, tools, stop)
  assert text.content == reply.content
  assert text.reasoning == (reply.reasoning or "")


def test_content_after_reasoning_is_sent_before_the_end(tool_tokenizer):
  renderer = render.Renderer(tool_tokenizer, "qwen3")
  ids = tool_tokenizer.encode("<think>\nhm\n</think>\n\nOne two three.")
  before, text, _ = stream_all(renderer, [1, 2], ids, [1], [], ())
  assert before == "One two three."
  assert text.reasoning == "hm"


def test_a_character_is_sent_when_it_is_whole(smollm2):
  renderer = render.Renderer(smollm2)
  ids = smollm2.encode("🙂", add_special_tokens=False)
  assert len(ids) > 1
  text = stream.TextStream(renderer, [], [], ())
  sent = [text.feed([i])[1] for i in ids]
  assert sent == [""] * (len(ids) - 1) + ["🙂"]


def test_the_beginning_of_a_stop_string_is_held(smollm2):
  renderer = render.Renderer(smollm2)
  text = stream.TextStream(renderer, [], [], ("stop here",))
  sent = ""
  for token in smollm2.encode("please stop there", add_special_tokens=False):
    sent += text.feed([token])[1]
    assert not sent.endswith("stop")
  assert sent == "please stop there"
