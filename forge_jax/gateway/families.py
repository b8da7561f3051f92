"""Which family of the `renderers` package a model is of, and its renderer.

A template may drop the reasoning of past turns once the user speaks again, and
so write anew what the model has seen. Where it has a variable that keeps it,
`keep_reasoning` sets that; where it has none, a conversation that goes on keeps
what was sampled all the same, and only one that is read anew is written as the
template has it.
"""

from collections.abc import Mapping
import re
from typing import Any

import renderers
from renderers import base
import transformers

from forge_jax import errors

GENERIC = "default"  # any model: its own chat template
# What a chat template contains -> the parser of the tool calls it describes.
_TOOL_PARSERS = (
  ("<arg_key>", "glm"),
  ("<function=", "qwen3.5"),
  ("<tool_call>", "qwen3"),
  ("<｜tool▁calls▁begin｜>", "deepseek-v3"),
)
_HINTS = {
  "gpt-oss": "; TIKTOKEN_ENCODINGS_BASE names a folder with "
  "o200k_base.tiktoken, see docs/gateway.md"
}
# Variables of templates and options of renderers that keep all reasoning.
_KEEP_REASONING: Mapping[str, bool] = {
  "preserve_thinking": True,
  "preserved_thinking": True,
  "clear_thinking": False,
  "truncate_history_thinking": False,
  "drop_thinking": False,
  "auto_drop_analysis": False,
}


def create(
  tokenizer: transformers.PreTrainedTokenizerFast,
  name: str,
  variables: Mapping[str, Any],
  keep_reasoning: bool,
) -> renderers.Renderer:
  """The renderer of a family; see `render.Renderer` for the arguments.

  Raises:
    ConfigError: there is no such renderer, or it does not fit the tokenizer.
  """
  try:
    if name == GENERIC:
      return renderers.create_renderer(
        tokenizer,
        renderers.DefaultRendererConfig(tool_parser=tool_parser(tokenizer)),
      )
    config = renderers.config_from_name(name)
    if keep_reasoning:
      options = keeping(tokenizer, name, variables)
      config = type(config)(**options or {"thinking_retention": "all"})
    return renderers.create_renderer(
      tokenizer, config, chat_template_kwargs=dict(variables)
    )
  except (ValueError, TypeError, AssertionError, RuntimeError) as error:
    raise errors.ConfigError(
      f"renderer {name!r} cannot be used: {error}{_HINTS.get(name, '')}"
    ) from error


def keeping(
  tokenizer: transformers.PreTrainedTokenizerFast,
  name: str,
  variables: Mapping[str, Any],
) -> dict[str, bool]:
  """What keeps the reasoning of past turns, if not among `variables`."""
  return {
    option: value
    for option, value in _KEEP_REASONING.items()
    if option not in variables and knows(tokenizer, name, option)
  }


def knows(
  tokenizer: transformers.PreTrainedTokenizerFast, name: str, variable: str
) -> bool:
  """Whether a family, or a model's own template, has a variable."""
  if name == GENERIC:
    return re.search(rf"\b{variable}\b", tokenizer.chat_template) is not None
  return variable in type(renderers.config_from_name(name)).model_fields


def pick(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
  """The family of a model known by name; else its own chat template."""
  folder = str(tokenizer.name_or_path).rstrip("/").rpartition("/")[2]
  for model, family in base.MODEL_RENDERER_MAP.items():
    if folder and folder == model.rpartition("/")[2]:
      return family
  return GENERIC


def tool_parser(
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> str | None:
  """The parser of the tool calls that the chat template describes."""
  for marker, parser in _TOOL_PARSERS:
    if marker in tokenizer.chat_template:
      return parser
  return None
