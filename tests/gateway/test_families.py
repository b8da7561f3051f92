"""Every family of `renderers`: a tool loop through a session, token by token.

No model's own tokenizer is here: each family gets the byte tokenizer with its
special tokens added, which is all that its renderer asks for.
"""

import json
import re

import pytest
from renderers import base
from tokenizers import AddedToken

from forge_jax import errors, types
from forge_jax.gateway import call_ids, render, scripted, sessions, template

# gpt-oss reads a vocabulary from the network. DeepSeek-R1's template drops the
# reasoning of every past turn: each of its requests is a root.
FAMILIES = sorted(
  {*base.MODEL_RENDERER_MAP.values()} - {"gpt-oss", "deepseek-r1"}
)
MISSING = re.compile(
  r"(?:[Tt]oken|special).{0,20}?['\"]([^'\"]+)['\"]"
  r"|['\"](<[^'\"]+)['\"].*(?:not|missing)"
)
MOST_TOKENS = 80
NATIVE_IDS = {"kimi-k2", "kimi-k2.5"}
# Going on, `renderers` leaves out a line break that the templates write.
NO_BREAK = {"laguna-m.1", "laguna-xs.2"}


def renderer_of(family):
  """The family's renderer, with every token that it misses."""
  tokenizer = scripted.byte_tokenizer()
  for _ in range(MOST_TOKENS):
    try:
      return render.Renderer(tokenizer, family)
    except errors.ConfigError as error:
      found = MISSING.search(str(error))
      assert found, error
      token = AddedToken(found[1] or found[2], special=True, normalized=False)
      assert tokenizer.add_tokens([token]) == 1
  raise AssertionError(f"{family} misses ever more tokens")


def user(text):
  return {"role": "user", "content": text}


def as_sampled(renderer, messages, said, new, tools):
  """What the model samples to say something, as its template writes it.

  Returns:
    The token ids, with the stop token; the whole conversation's text after
    them, up to the next reply; whether the prompt's text is as the template
    writes it in a conversation.
  """
  prompt = renderer.decode(renderer.render(messages, tools))
  whole = renderer.decode(renderer.render([*messages, said, *new], tools))
  full = renderer._family.render(
    template.with_objects([*messages, said]), tools=list(tools) or None
  )
  ids = [
    token
    for token, of, sampled in zip(
      full.token_ids, full.message_indices, full.sampled_mask, strict=True
    )
    if of == len(messages) and sampled
  ]
  text = renderer.decode(ids)
  end = whole.rindex(text) + len(text)
  for stop in renderer.stop_token_ids:
    marker = renderer.decode([stop])
    if ids[-1] not in renderer.stop_token_ids and whole[end:].startswith(
      marker
    ):
      end += len(marker)
      text += marker
  fits = whole.startswith(prompt)
  if fits:
    text = whole[len(prompt) : end]
  return renderer.encode_rest(text), whole[end:], fits


def record(session, plan, ids, message):
  session.record(
    plan,
    response_ids=ids,
    logprobs=[-1.0] * len(ids),
    versions=[0] * len(ids),
    stop_reason=types.StopReason.STOP,
    reply=message,
  )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tool_loop_keeps_what_was_sampled(family, calculator):
  renderer, tools = renderer_of(family), [calculator]
  session = sessions.Session("s", seed=0, sampling={})
  messages = [{"role": "system", "content": "Be brief."}, user("2+3?")]
  native = "functions.calculate:0"
  function = {"name": "calculate", "arguments": '{"expression": "2+3"}'}
  said = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "hm",
    "tool_calls": [{"id": native, "type": "function", "function": function}],
  }
  result = {"role": "tool", "tool_call_id": native, "content": "5"}
  new = [{**result, "name": "calculate"}]
  ids, rest, fits = as_sampled(renderer, messages, said, new, tools)

  plan = session.begin(renderer, messages, tools)
  reply = renderer.parse(plan.prompt_ids, ids, tools)
  assert [(c.name, json.loads(c.arguments)) for c in reply.tool_calls] == [
    ("calculate", {"expression": "2+3"})
  ]
  assert reply.content.strip() == "" and not reply.malformed
  assert (reply.tool_calls[0].id == native) == (family in NATIVE_IDS)
  function = {"name": "calculate", "arguments": reply.tool_calls[0].arguments}
  call = {"id": "call_0_0", "type": "function", "function": function}
  sent = {"role": "assistant", "content": None, "tool_calls": [call]}
  kept = {**call, call_ids.NATIVE: reply.tool_calls[0].id}
  record(session, plan, ids, {**sent, "tool_calls": [kept]})

  # The client has changed the id, as some do.
  sent["tool_calls"] = [{**call, "id": "own"}]
  messages += [sent, {"role": "tool", "tool_call_id": "own", "content": "5"}]
  after = session.begin(renderer, messages, tools)
  assert after.parent is not None, after.fork_reason
  assert after.prompt_ids == plan.prompt_ids + ids + after.added_ids
  rest = rest.lstrip("\n") if family in NO_BREAK else rest
  assert renderer.decode(after.added_ids) == rest
  if fits and family not in NO_BREAK:
    seen = renderer.decode(plan.prompt_ids + ids)
    again = renderer.render([*messages[:2], said, *new], tools)
    assert seen + rest == renderer.decode(again)
