"""Tool calls as scripts write them and as environments read them."""

from collections.abc import Mapping
import json
from typing import Any

from forge_jax import types


def call(*calls: tuple[str, Mapping[str, Any]]) -> types.Message:
  """The assistant message that calls tools, all at once."""
  return {
    "role": "assistant",
    "content": "",
    "tool_calls": [
      {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
      }
      for number, (name, arguments) in enumerate(calls)
    ],
  }


def read(written: Any) -> dict[str, Any]:
  """The arguments of a call; empty if they are no JSON object."""
  try:
    arguments = json.loads(written or "{}")
  except (ValueError, TypeError):
    return {}
  return arguments if isinstance(arguments, dict) else {}
