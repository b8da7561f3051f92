"""Tool calls as a family's parser has read them: which of them are calls."""

from collections.abc import Mapping
import json
from typing import Any

import renderers

from forge_jax import types

_BAD = frozenset(
  {
    renderers.ToolCallParseStatus.UNCLOSED_BLOCK,
    renderers.ToolCallParseStatus.MALFORMED_STRUCTURE,
  }
)


def arguments(
  call: renderers.ParsedToolCall, tools: types.Messages
) -> str | None:
  """The arguments as JSON; None if there is no name or no object of them."""
  # Some parsers mark a call as invalid JSON when an argument is a bare string,
  # which is what its format asks for: what counts is that there is an object.
  if (
    call.status in _BAD
    or not isinstance(call.name, str)
    or not call.name
    or not isinstance(call.arguments, dict)
  ):
    return None
  text = json.dumps(
    _as_declared(call.name, call.arguments, tools), ensure_ascii=False
  )
  try:
    (call.name + text).encode()
  except UnicodeEncodeError:  # JSON can escape what is no text
    return None
  return text


def _as_declared(
  name: str, arguments: Mapping[str, Any], tools: types.Messages
) -> dict[str, Any]:
  """Arguments with booleans where a model has written Python's for JSON's.

  The templates of Qwen3.5 and Nemotron write them so, and their parsers take
  them for strings.
  """
  declared: Any = {}
  for tool in tools:
    if tool["function"]["name"] == name:
      declared = (tool["function"].get("parameters") or {}).get("properties")
  declared = declared if isinstance(declared, dict) else {}

  def read(key: str, value: Any) -> Any:
    schema = declared.get(key)
    is_boolean = isinstance(schema, dict) and schema.get("type") == "boolean"
    if is_boolean and value in ("True", "False"):
      return value == "True"
    return value

  return {key: read(key, value) for key, value in arguments.items()}
