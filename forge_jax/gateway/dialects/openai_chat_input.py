"""The messages of a Chat Completions request, brought to one form.

Role `developer` becomes `system`, a list of text parts their concatenation, an
absent content the empty string; an assistant's reasoning is read under any name
that servers and clients have for it.
"""

from typing import Any

from forge_jax.gateway.dialects import fields

# What servers and clients call the reasoning of a turn.
_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "thinking")
_ROLES = ("system", "developer", "user", "assistant", "tool")


def messages(values: list[Any]) -> list[dict[str, Any]]:
  """The messages that a request holds.

  Raises:
    Refusal: there is none, or one is malformed; it names the place.
  """
  if not values:
    raise fields.bad("messages", "at least one message is required")
  return [_message(v, f"messages[{n}]") for n, v in enumerate(values)]


def _message(value: Any, where: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise fields.bad(where, "a message is an object")
  role = value.get("role")
  if role not in _ROLES:
    raise fields.bad(
      f"{where}.role", f"must be one of {list(_ROLES)}, not {role!r}"
    )
  message = {
    "role": "system" if role == "developer" else role,
    "content": _content(value.get("content"), role, f"{where}.content"),
  }
  if role == "tool":
    message["tool_call_id"] = fields.field(
      value, "tool_call_id", str, where=where
    )
  if isinstance(value.get("name"), str):
    message["name"] = value["name"]
  if role == "assistant":
    if value.get("tool_calls"):
      message["tool_calls"] = _tool_calls(value, where)
    if reasoning := _reasoning(value):
      message["reasoning_content"] = reasoning
  return message


def _reasoning(message: dict[str, Any]) -> str:
  """The reasoning of an assistant's message, under any of its names."""
  for name in _REASONING:
    if isinstance(message.get(name), str) and message[name]:
      return message[name]
  parts = message.get("reasoning_details")
  texts = [
    part["text"]
    for part in (parts if isinstance(parts, list) else ())
    if isinstance(part, dict) and isinstance(part.get("text"), str)
  ]
  return "".join(texts)


def _content(value: Any, role: str, where: str) -> str:
  if isinstance(value, str):
    return value
  if value is None and role == "assistant":
    return ""
  if not isinstance(value, list):
    raise fields.bad(where, "must be a string or a list of text parts")
  texts = []
  for n, part in enumerate(value):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
      raise fields.bad(
        f"{where}[{n}]", f"only text parts are supported, not {kind}"
      )
    texts.append(part["text"])
  return "".join(texts)


def _tool_calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
  calls = []
  for n, call in enumerate(
    fields.field(message, "tool_calls", list, where=where)
  ):
    at = f"{where}.tool_calls[{n}]"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
      raise fields.bad(at, "must be a call of a function")
    calls.append(
      {
        "id": fields.field(call, "id", str, where=at),
        "type": "function",
        "function": {
          "name": fields.field(function, "name", str, where=f"{at}.function"),
          "arguments": fields.field(
            function, "arguments", str, where=f"{at}.function"
          ),
        },
      }
    )
  return calls
