"""What a model of each family of `renderers` would sample, without the model.

No model's own tokenizer is here: each family gets the byte tokenizer with its
special tokens added, which is all that its renderer asks for.
"""

import functools
import re

from renderers import base
from tokenizers import AddedToken

from forge_jax import errors
from forge_jax.gateway import render, scripted, template

# gpt-oss reads a vocabulary that is not here.
FAMILIES = sorted({*base.MODEL_RENDERER_MAP.values()} - {"gpt-oss"})
VARIABLES = {  # that make a family reason
  "deepseek-v4": {"enable_thinking": True},
  "gemma4": {"enable_thinking": True},
  "hy3": {"reasoning_effort": "high"},
  "laguna-m.1": {"enable_thinking": True},
  "laguna-xs.2": {"enable_thinking": True},
  "laguna-xs-2.1": {"enable_thinking": True},
}
_MISSING = re.compile(
  r"(?:[Tt]oken|special).{0,20}?['\"]([^'\"]+)['\"]"
  r"|['\"](<[^'\"]+)['\"].*(?:not|missing)"
)
_MOST_TOKENS = 80


@functools.cache
def tokenizer_of(family):
  """The byte tokenizer with every token that the family's renderer needs."""
  tokenizer = scripted.byte_tokenizer()
  for _ in range(_MOST_TOKENS):
    try:
      render.Renderer(tokenizer, family)
    except errors.ConfigError as error:
      found = _MISSING.search(str(error))
      assert found, error
      token = AddedToken(found[1] or found[2], special=True, normalized=False)
      assert tokenizer.add_tokens([token]) == 1
    else:
      return tokenizer
  raise AssertionError(f"{family} misses ever more tokens")


@functools.cache
def renderer_of(family, reasons=False, keep_reasoning=False):
  """The family's renderer; `reasons`: of a model that does if it can."""
  variables = VARIABLES.get(family, {}) if reasons else {}
  tokenizer = tokenizer_of(family)
  return render.Renderer(tokenizer, family, variables, keep_reasoning)


def whole(renderer, messages, tools):
  """The text of a conversation, rendered from scratch, up to its reply."""
  return renderer.decode(renderer.render(messages, tools).ids)


def sampled(renderer, messages, said, tools):
  """What the model samples to say something, as its template writes it.

  Returns:
    The token ids, with the stop token; None if the template does not write this
    after the opening of a reply.
  """
  prompt = whole(renderer, messages, tools)
  calls = said.get("tool_calls") or ()
  results = [
    {"role": "tool", "tool_call_id": c["id"], "name": "f", "content": "r"}
    for c in calls
  ]
  new = results or [{"role": "user", "content": "u"}]
  last = renderer.decode(
    renderer._family.render_ids(
      template.with_objects([*messages, said]), tools=list(tools) or None
    )
  )
  inner = whole(renderer, [*messages, said, *new], tools)
  stops = [renderer.decode([stop]) for stop in renderer.stop_token_ids]
  reasoning = said.get("reasoning_content")
  # An empty reasoning may be written in the last turn alone.
  texts = [last] if reasoning else [inner, last]
  before, think, rest = prompt.rpartition("<think>")
  inside = think and not rest.strip()
  if inside and reasoning and reasoning not in last:
    # The template drops it at once.
    body = last.removeprefix(before) if calls else said["content"]
    texts = [f"{prompt}{reasoning}</think>{body}"]
  for text in texts:
    if text.startswith(prompt):
      text = text[len(prompt) :]
      ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
      if ends:
        return renderer.encode_rest(text[: min(ends)])
      # Where the next turn's opening ends a reply, it is that of its role.
      markers = [stop for stop in stops if stop in prompt] or stops
      if calls and inner.startswith(last):
        after = inner[len(last) :]
        markers = [stop for stop in stops if after.startswith(stop)]
      return renderer.encode_rest(text + markers[0])
  return None
