import asyncio
import copy
import threading

import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax import errors
from forge_jax.gateway import refusal, render

TEXT = st.text(
  st.characters(blacklist_categories=("Cs",), blacklist_characters="<|"),
  max_size=30,
)
SLOW = hypothesis.settings(
  max_examples=40,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def turn(role, text):
  return {"role": role, "content": text}


def play(renderer, tokenizer, tools, said, cuts):
  """Plays a conversation; returns (ids the model saw, its messages)."""
  messages = [turn("system", "Be brief."), turn("user", said[0])]
  added = renderer.render(messages, tools)
  prompt = list(added.ids)
  for text, cut in zip(said[1:], cuts, strict=True):
    response = tokenizer.encode(text, add_special_tokens=False)
    if not cut or not response:
      response = [*response, tokenizer.eos_token_id]
    content = renderer.parse(prompt, response, tools).content
    messages.append(turn("assistant", content))
    new = [turn("user", text[::-1])]
    extends = (prompt, response, messages, new, tools)
    slow = renderer.extend(*extends)  # compares several renderings
    added = renderer.extend(*extends, added.written)
    assert added.ids.tolist() == slow.ids.tolist()
    assert added.written == slow.written
    prompt = [*prompt, *response, *added.ids]
    messages += new
  return prompt, messages


def call(name, arguments):
  return (
    f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
  )


@SLOW
@hypothesis.given(said=st.lists(TEXT, min_size=2, max_size=4), data=st.data())
@pytest.mark.parametrize("which", ["smollm2", "tools"])
def test_what_the_model_sees_is_the_whole_rendering(request, which, said, data):
  """Token by token extended, text for text the whole conversation."""
  name = "smollm2" if which == "smollm2" else "tool_tokenizer"
  tokenizer = request.getfixturevalue(name)
  tools = [request.getfixturevalue("calculator")] if which == "tools" else []
  renderer = render.Renderer(tokenizer)
  cuts = [data.draw(st.booleans()) for _ in said[1:]]
  seen, messages = play(renderer, tokenizer, tools, said, cuts)
  whole = renderer.render(messages, tools).ids
  assert renderer.decode(seen) == renderer.decode(whole)


def test_one_rendering_shows_what_follows_a_reply(smollm2, monkeypatch):
  renderer = render.Renderer(smollm2)
  messages = [turn("system", "x"), turn("user", "a")]
  prompt, response = renderer.render(messages, []), smollm2.encode("b")
  response.append(smollm2.eos_token_id)
  rendered = []
  write = smollm2.apply_chat_template
  monkeypatch.setattr(
    smollm2,
    "apply_chat_template",
    lambda m, **kwargs: rendered.append(m) or write(m, **kwargs),
  )
  for said, count in (("b", 1), ("other", 2)):  # as it was sampled, or not
    rendered.clear()
    conversation = [*messages, turn("assistant", said)]
    added = renderer.extend(
      prompt.ids,
      response,
      conversation,
      [turn("user", "c")],
      [],
      prompt.written,
    )
    assert renderer.decode(added.ids) == (
      "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(rendered) == count


async def test_a_long_text_is_encoded_beside_the_loop(smollm2, monkeypatch):
  renderer = render.Renderer(smollm2)
  free = threading.Event()
  encode = renderer.encode_rest
  monkeypatch.setattr(
    renderer, "encode_rest", lambda text: free.wait(30) and encode(text)
  )
  added = renderer.render([turn("user", "a long story " * 400)], [])
  task = asyncio.create_task(added.ready())
  await asyncio.sleep(0.01)
  assert not task.done()
  free.set()  # which nobody could, were the loop held
  await task
  assert (
    added.ids.tolist()
    == renderer.render([turn("user", "a long story " * 400)], []).ids.tolist()
  )


@pytest.mark.parametrize("name", ["default", "qwen3"])
def test_calls_and_results_extend_the_sampled_ids(
  tool_tokenizer, calculator, name
):
  renderer = render.Renderer(tool_tokenizer, name)
  messages, tools = [turn("user", "2+3?")], [calculator]
  prompt = list(renderer.render(messages, tools).ids)
  # The model writes its JSON with spaces that no template would write.
  said = '<tool_call>\n{"name":  "calculate",  "arguments": {"expression": "2+3"}}\n</tool_call>'
  response = [*tool_tokenizer.encode(said), tool_tokenizer.eos_token_id]
  reply = renderer.parse(prompt, response, tools)
  assert reply.tool_calls == (
    render.ToolCall("calculate", '{"expression": "2+3"}'),
  )
  assert reply.content == "" and not reply.malformed
  messages.append(
    {
      "role": "assistant",
      "content": "",
      "tool_calls": [
        {
          "id": "x",
          "type": "function",
          "function": {"name": c.name, "arguments": c.arguments},
        }
        for c in reply.tool_calls
      ],
    }
  )
  new = [{"role": "tool", "tool_call_id": "x", "content": "5"}]
  added = renderer.extend(prompt, response, messages, new, tools)
  assert renderer.decode(added.ids) == (
    "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  whole = renderer.decode(renderer.render([*messages, *new], tools).ids)
  seen = renderer.decode([*prompt, *response, *added.ids])
  if name == "default":
    assert seen.replace("  ", " ") == whole


@pytest.mark.parametrize(
  "said",
  [
    "<tool_call>\nnot JSON\n</tool_call>",
    '<tool_call>\n{"name": "calculate", "arguments": "2+3"}\n</tool_call>',
    '<tool_call>\n{"arguments": {}}\n</tool_call>',
    call(5, "{}").replace('"5"', "5"),
    call("calculate", '{"a": "\\ud800"}'),
    call("calculate", '{"a": ' + "9" * 5000 + "}"),
    call("calculate", '{"a": ' * 3000 + "1"),
    '<tool_call>\n{"name": "calculate", "arguments": {}}',
    call("calculate", "{}") + "\n<tool_call>\n[]\n</tool_call>",
  ],
)
@pytest.mark.parametrize("name", ["default", "qwen3"])
def test_malformed_calls_are_text(tool_tokenizer, calculator, name, said):
  renderer = render.Renderer(tool_tokenizer, name)
  response = [*tool_tokenizer.encode(said), tool_tokenizer.eos_token_id]
  reply = renderer.parse([1, 2], response, [calculator])
  assert (reply.content, reply.tool_calls) == (said, ())
  assert reply.malformed


def test_a_call_without_tools_is_text(tool_tokenizer):
  renderer = render.Renderer(tool_tokenizer)
  said = call("calculate", "{}")
  reply = renderer.parse([1, 2], tool_tokenizer.encode(said), [])
  assert (reply.content, reply.malformed) == (said, False)


def test_reasoning_is_told_apart(tool_tokenizer):
  renderer = render.Renderer(tool_tokenizer, "qwen3")
  said = "<think>\nhm\n</think>\n\nYes."
  reply = renderer.parse([1, 2], tool_tokenizer.encode(said), [])
  assert (reply.reasoning, reply.content) == ("hm", "Yes.")


def test_a_family_is_picked_by_the_model_s_name(smollm2, tool_tokenizer):
  assert render.Renderer(smollm2).name == "default"
  named = copy.deepcopy(tool_tokenizer)
  named.name_or_path = "/models/Qwen3-0.6B"
  assert render.Renderer(named).name == "qwen3"


def test_a_template_that_rewrites_its_past_is_not_extended(smollm2):
  tokenizer = copy.deepcopy(smollm2)
  # Only the last assistant turn is shown in full.
  tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}...{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  )
  renderer = render.Renderer(tokenizer)
  messages = [turn("user", "hi")]
  prompt = renderer.render(messages, []).ids
  response = [*tokenizer.encode("hello"), tokenizer.eos_token_id]
  messages.append(turn("assistant", "hello"))
  new = [turn("user", "again")]
  assert renderer.extend(prompt, response, messages, new, []) is None


def test_a_turn_ended_by_another_stop_token_is_not_extended(smollm2):
  tokenizer = copy.deepcopy(smollm2)
  tokenizer.eos_token = "<|endoftext|>"
  renderer = render.Renderer(tokenizer)
  # Both end a turn: the tokenizer's, and the one that the template writes.
  assert set(renderer.stop_token_ids) == {0, 2}
  messages = [turn("user", "hi"), turn("assistant", "hello")]
  prompt, said = (
    renderer.render(messages[:1], []).ids,
    tokenizer.encode("hello"),
  )
  new = [turn("user", "again")]
  assert renderer.extend(prompt, [*said, 2], messages, new, [])
  assert renderer.extend(prompt, [*said, 0], messages, new, []) is None


def test_tools_that_the_template_would_not_show_are_refused(
  smollm2, calculator
):
  with pytest.raises(refusal.Refusal, match="does not show tools") as caught:
    render.Renderer(smollm2).render([turn("user", "hi")], [calculator])
  assert caught.value.param == "tools"


def test_messages_that_the_template_refuses(smollm2):
  tokenizer = copy.deepcopy(smollm2)
  tokenizer.chat_template = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system turns') }}{% endif %}"
    + smollm2.chat_template
  )
  renderer = render.Renderer(tokenizer)
  with pytest.raises(refusal.Refusal, match="no system turns"):
    renderer.render([turn("system", "x")], [])


@pytest.mark.parametrize("keep", [True, False])
def test_a_template_s_own_variable_keeps_reasoning(smollm2, keep):
  tokenizer = copy.deepcopy(smollm2)
  tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and (loop.last or clear_thinking is false) %}"
    "{{ m.reasoning_content }}|{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
  )
  renderer = render.Renderer(tokenizer, keep_reasoning=keep)
  messages = [turn("user", "hi")]
  prompt = renderer.render(messages, []).ids
  response = [*tokenizer.encode("hm|hello"), tokenizer.eos_token_id]
  messages.append({**turn("assistant", "hello"), "reasoning_content": "hm"})
  new = [turn("user", "again")]
  added = renderer.extend(prompt, response, messages, new, [])
  assert (added is not None) == keep
  if keep:
    whole = renderer.render([*messages, *new], []).ids
    seen = [*prompt, *response, *added.ids]
    assert renderer.decode(seen) == renderer.decode(whole)


def test_template_variables_reach_the_template(smollm2):
  tokenizer = copy.deepcopy(smollm2)
  tokenizer.chat_template = "{{ mood }}" + smollm2.chat_template
  renderer = render.Renderer(tokenizer, template_kwargs={"mood": "calm"})
  ids = renderer.render([turn("user", "x")], []).ids
  assert renderer.decode(ids).startswith("calm<|im_start|>")


def test_renderers_that_do_not_fit(smollm2):
  with pytest.raises(errors.ConfigError, match=r"'qwen33'.*Known: .*qwen3"):
    render.Renderer(smollm2, "qwen33")
  with pytest.raises(
    errors.ConfigError, match=r"'qwen3' cannot be used.*not found"
  ):
    render.Renderer(smollm2, "qwen3")
