"""Custom tools of OpenAI's protocols: for the model, functions of one string.

The string is called `input`. A format's grammar is told to the model in the
description. One that is a regular expression is enforced; one in Lark is where
the model's family writes strings as they are, and not where it writes JSON.
"""

from collections.abc import Mapping
import json
from typing import Any

from forge_jax.gateway import stored

_PARAMETERS = {
  "type": "object",
  "properties": {"input": {"type": "string"}},
  "required": ["input"],
}


def function(
  name: str, description: str, format: Mapping[str, Any]
) -> dict[str, Any]:
  """A custom tool as the model is shown it; `format` as in Responses."""
  texts = [description]
  if format.get("type") == "grammar":
    texts.append(
      f"The input follows this grammar ({format['syntax']}):\n"
      f"{format['definition']}"
    )
  shown = {"name": name}
  if text := "\n\n".join(filter(None, texts)):
    shown["description"] = text
  return {"type": "function", "function": {**shown, "parameters": _PARAMETERS}}


def strict(format: Mapping[str, Any]) -> dict[str, Any] | None:
  """The schema that calls must follow to the letter, if there is one."""
  if format.get("syntax") != "regex":
    return None
  pattern = f"^(?:{format['definition']})$"
  return {
    **_PARAMETERS,
    "properties": {"input": {"type": "string", "pattern": pattern}},
    "additionalProperties": False,
  }


def lark(format: Mapping[str, Any]) -> dict[str, str]:
  """The grammars in Lark of a call's arguments."""
  if format.get("syntax") != "lark":
    return {}
  return {"input": format["definition"]}


def sent(id: str, arguments: str, ledger: stored.Stored) -> str:
  """The input that a client is sent.

  Args:
    id: of the call.
    arguments: that the model wrote; a JSON object.
    ledger: remembers those that are not the one string, and are sent whole.
  """
  value = json.loads(arguments)
  if list(value) == ["input"] and isinstance(value["input"], str):
    return value["input"]
  ledger.issue(id, stored.IssuedCall(arguments, arguments))
  return arguments


def written(id: str, input: str, ledger: stored.Stored) -> str:
  """The arguments that the model wrote where a client was sent `input`."""
  arguments = ledger.arguments(id, input)
  if arguments is None:
    return json.dumps({"input": input}, ensure_ascii=False)
  return arguments
