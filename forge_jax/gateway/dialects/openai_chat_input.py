"""The messages of a Chat Completions request, brought to one form.

Role `developer` becomes `system`, a list of text parts their concatenation, an
absent content the empty string; an assistant's reasoning is read under any name
that servers and clients have for it.
"""

from typing import Any

from forge_jax.gateway import stored
from forge_jax.gateway.dialects import fields, openai_custom

# What servers and clients call the reasoning of a turn.
_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "thinking")
_ROLES = ("system", "developer", "user", "assistant", "tool")


def messages(values: list[Any], ledger: stored.Stored) -> list[dict[str, Any]]:
  """The messages that a request holds.

  Args:
    values: as they were sent.
    ledger: knows what calls of custom tools were when they do not say it.

  Raises:
    Refusal: there is none, or one is malformed; it names the place.
  """
  if not values:
    raise fields.bad("messages", "at least one message is required")
  return [_message(v, f"messages[{n}]", ledger) for n, v in enumerate(values)]


def _message(value: Any, where: str, ledger: stored.Stored) -> dict[str, Any]:
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
      message["tool_calls"] = _tool_calls(value, where, ledger)
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


def _tool_calls(
  message: dict[str, Any], where: str, ledger: stored.Stored
) -> list[dict[str, Any]]:
  calls = []
  for n, call in enumerate(
    fields.field(message, "tool_calls", list, where=where)
  ):
    at = f"{where}.tool_calls[{n}]"
    kind = "function"
    if isinstance(call, dict) and call.get("type") == "custom":
      kind = "custom"
    called = call.get(kind) if isinstance(call, dict) else None
    if not isinstance(called, dict):
      raise fields.bad(at, "must be a call of a function or a custom tool")
    id, at = fields.field(call, "id", str, where=at), f"{at}.{kind}"
    name = fields.field(called, "name", str, where=at)
    if kind == "function":
      arguments = fields.field(called, "arguments", str, where=at)
    else:
      said = fields.field(called, "input", str, where=at)
      arguments = openai_custom.written(id, said, ledger)
    function = {"name": name, "arguments": arguments}
    calls.append({"id": id, "type": "function", "function": function})
  return calls
