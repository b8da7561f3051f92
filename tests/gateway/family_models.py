"""What a model of each family of `renderers` would sample, without the model.

No model's own tokenizer is here: each family gets the byte tokenizer with its
special tokens added, which is all that its renderer asks for. That of gpt-oss
reads and writes by OpenAI's own vocabulary, which js-tiktoken brings, where
.agents is.
"""

import base64
import functools
import os
import pathlib
import re
import tempfile

from renderers import base
from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
)
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from forge_jax import errors
from forge_jax.gateway import render, scripted, template

_RANKS = (
  pathlib.Path(__file__).parents[2]
  / ".agents/node_modules/js-tiktoken/dist/ranks/o200k_base.js"
)
FAMILIES = sorted(
  {*base.MODEL_RENDERER_MAP.values()}
  - (set() if _RANKS.exists() else {"gpt-oss"})
)
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
  if family == "gpt-oss":
    return _harmony_tokenizer()
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


_HARMONY = {  # ids of its special tokens
  "<|startoftext|>": 199998,
  "<|endoftext|>": 199999,
  "<|return|>": 200002,
  "<|constrain|>": 200003,
  "<|channel|>": 200005,
  "<|start|>": 200006,
  "<|end|>": 200007,
  "<|message|>": 200008,
  "<|call|>": 200012,
}
_ANALYSIS = "<|channel|>analysis<|message|>"
_FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
_FOLDER = tempfile.TemporaryDirectory()  # of a vocabulary, till the end


def _harmony_tokenizer():
  """Decodes gpt-oss's ids; encodes by bytes, which its vocabulary has, too."""
  [ranks] = re.findall(r'"bpe_ranks":"! 0 ([^"]+)"', _RANKS.read_text())
  tokens = ranks.split(" ")
  path = pathlib.Path(_FOLDER.name) / "o200k_base.tiktoken"
  path.write_text("".join(f"{t} {n}\n" for n, t in enumerate(tokens)))
  os.environ["TIKTOKEN_ENCODINGS_BASE"] = _FOLDER.name
  letters = bytes_to_unicode()
  vocabulary = {
    "".join(letters[byte] for byte in base64.b64decode(token)): n
    for n, token in enumerate(tokens)
  }
  for n in range(len(tokens), max(_HARMONY.values()) + 1):
    vocabulary[f"<|reserved_{n}|>"] = n
  for marker, n in _HARMONY.items():
    del vocabulary[f"<|reserved_{n}|>"]
    vocabulary[marker] = n
  backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<|return|>", chat_template="-"
  )
  tokenizer.add_tokens(
    [AddedToken(m, special=True, normalized=False) for m in _HARMONY]
  )
  return tokenizer


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
  if prompt.endswith(_ANALYSIS) and not calls:  # and so does gpt-oss's
    final = f"{_FINAL}{said['content']}<|return|>"
    texts = [f"{prompt}{reasoning or ''}{final}"]
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
