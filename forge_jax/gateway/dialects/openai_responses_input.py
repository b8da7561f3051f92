"""The input of a Responses request: items, and the messages that they say.

Items are read to one form, which is also what is stored: a message's content is
a list of text parts, a reference is the item that it names. Several texts of an
item are one text, their concatenation.

The items of one assistant turn come apart on the wire: reasoning, then a
message, then calls. They are one internal message again, the one that was
recorded for the reply. An item that would come earlier in that order begins a
new turn.

An image in a tool's output becomes the text "[image]", since an agent cannot
keep its tools from returning one; anywhere else it is refused.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any

from forge_jax.gateway import stored
from forge_jax.gateway.dialects import fields, openai_responses_tools

_ROLES = ("system", "developer", "user", "assistant")
_SEALED = "forge-reasoning-"  # what our encrypted_content begins with
# The order of the items of an assistant turn; only calls come several times.
_REASONING, _MESSAGE, _CALL = range(3)


def read(value: Any, ledger: stored.Stored) -> list[stored.Item]:
  """Reads the input to items of one form.

  Args:
    value: a string, a list of items, or None.
    ledger: what references may name.

  Raises:
    Refusal: an item is malformed, not supported, or names what is not stored.
  """
  if value is None:
    return []
  if isinstance(value, str):
    return [_message({"role": "user", "content": value}, "input")]
  if not isinstance(value, list):
    raise fields.bad("input", "must be a string or a list of items")
  return [_item(v, f"input[{n}]", ledger) for n, v in enumerate(value)]


def messages(
  items: Sequence[stored.Item], ledger: stored.Stored
) -> list[dict[str, Any]]:
  """The messages that items say, in the internal form."""
  said: list[dict[str, Any]] = []
  turn, last = None, _CALL  # the assistant turn that may go on
  for item in items:
    kind = item["type"]
    if kind in ("reasoning", "function_call", "custom_tool_call"):
      rank = _REASONING if kind == "reasoning" else _CALL
    elif kind == "message" and item["role"] == "assistant":
      rank = _MESSAGE
    else:
      turn = None
      said.append(_other(item))
      continue
    if turn is None or rank < last or rank == last != _CALL:
      turn = {"role": "assistant", "content": ""}
      said.append(turn)
    last = rank
    if rank == _REASONING:
      turn["reasoning_content"] = _reasoning_text(item)
    elif rank == _MESSAGE:
      turn["content"] = _text(item["content"])
    else:
      calls = turn.setdefault("tool_calls", [])
      calls.append(openai_responses_tools.call(item, ledger))
  return said


def seal(reasoning: str) -> str:
  """The `encrypted_content` that brings a reasoning back; it is no secret."""
  return _SEALED + base64.urlsafe_b64encode(reasoning.encode()).decode()


def _unseal(sealed: str) -> str | None:
  """The reasoning that `seal` was given; None if it is not ours."""
  if not sealed.startswith(_SEALED):
    return None
  try:
    return base64.b64decode(
      sealed.removeprefix(_SEALED), b"-_", validate=True
    ).decode()
  except ValueError:
    return None


def _other(item: stored.Item) -> dict[str, Any]:
  """The message of an item that is no part of an assistant's turn."""
  if item["type"] == "message":
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": _text(item["content"])}
  output = item["output"]
  return {
    "role": "tool",
    "tool_call_id": item["call_id"],
    "content": output if isinstance(output, str) else _text(output),
  }


def _text(parts: Sequence[dict[str, Any]]) -> str:
  return "".join(p.get("text", p.get("refusal", "[image]")) for p in parts)


def _reasoning_text(item: stored.Item) -> str:
  """The reasoning that was sampled, however much of it the item shows."""
  if item.get("encrypted_content"):
    return _unseal(item["encrypted_content"]) or ""
  parts = item.get("content") or item["summary"]
  return "".join(part["text"] for part in parts)


def _item(value: Any, where: str, ledger: stored.Stored) -> stored.Item:
  if not isinstance(value, dict):
    raise fields.bad(where, "an item is an object")
  value = {k: v for k, v in value.items() if v is not None}
  kind = value.get("type")
  if kind is None:
    kind = "message" if "role" in value else "item_reference"
  if kind == "item_reference":
    return _referenced(value, where, ledger)
  if not isinstance(kind, str) or kind not in _READERS:
    raise fields.bad(
      f"{where}.type", f"items of type {kind!r:.40} are not supported"
    )
  item = _READERS[kind](value, where)
  id = fields.field(value, "id", str, "", where=where)
  return {"type": kind, **item, **({"id": id} if id else {})}


def _referenced(
  value: dict[str, Any], where: str, ledger: stored.Stored
) -> stored.Item:
  id = fields.field(value, "id", str, where=where)
  found = ledger.item(id)
  if found is None:
    raise fields.bad(
      f"{where}.id",
      f"no item {id!r} is stored in this session; items of a response are "
      "stored only if its `store` is true",
    )
  return found


def _message(value: dict[str, Any], where: str) -> dict[str, Any]:
  role = value.get("role")
  if role not in _ROLES:
    raise fields.bad(
      f"{where}.role", f"must be one of {list(_ROLES)}, not {role!r:.40}"
    )
  kinds = ("input_text", "text")
  if role == "assistant":
    kinds = ("output_text", "input_text", "text", "refusal")
  parts = value.get("content")
  if isinstance(parts, str):
    parts = [{"type": kinds[0], "text": parts}]
  parts = _parts(parts, kinds, f"{where}.content")
  return {"type": "message", "role": role, "content": parts, **_DONE}


def _call(value: dict[str, Any], where: str) -> dict[str, Any]:
  text = "arguments" if value["type"] == "function_call" else "input"
  item = {
    name: fields.field(value, name, str, where=where)
    for name in ("call_id", "name", text)
  }
  if namespace := fields.field(value, "namespace", str, "", where=where):
    item["namespace"] = namespace
  return {**item, **_DONE}


def _output(value: dict[str, Any], where: str) -> dict[str, Any]:
  output = value.get("output")
  if not isinstance(output, str):
    kinds = ("input_text", "output_text", "text", "input_image")
    output = _parts(output, kinds, f"{where}.output")
  call_id = fields.field(value, "call_id", str, where=where)
  return {"call_id": call_id, "output": output, **_DONE}


def _reasoning(value: dict[str, Any], where: str) -> dict[str, Any]:
  item: dict[str, Any] = {"summary": []}
  for name, kinds in (
    ("summary", ("summary_text",)),
    ("content", ("reasoning_text", "text")),
  ):
    if value.get(name):
      item[name] = _parts(value[name], kinds, f"{where}.{name}")
  sealed = fields.field(value, "encrypted_content", str, "", where=where)
  if sealed:
    if _unseal(sealed) is None:
      raise fields.bad(
        f"{where}.encrypted_content", "was not issued by this gateway"
      )
    item["encrypted_content"] = sealed
  return item


def _parts(
  values: Any, kinds: Sequence[str], where: str
) -> list[dict[str, Any]]:
  """Text parts of the given types, and images where they are allowed."""
  if not isinstance(values, list):
    raise fields.bad(where, "must be a string or a list of parts")
  parts = []
  for n, part in enumerate(values):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
      raise fields.bad(
        f"{where}[{n}]",
        f"only {' and '.join(kinds)} are supported here, not {kind!r:.40}",
      )
    if kind == "input_image":
      parts.append(_image(part, f"{where}[{n}]"))
      continue
    name = "refusal" if kind == "refusal" else "text"
    text = fields.field(part, name, str, where=f"{where}[{n}]")
    if kind != "refusal":  # one name for each text
      kind = kinds[0]
    read = {"type": kind, name: text}
    if kind == "output_text":
      read["annotations"] = []
    parts.append(read)
  return parts


def _image(part: dict[str, Any], where: str) -> dict[str, Any]:
  source = {
    name: fields.field(part, name, str, where=where)
    for name in ("image_url", "file_id")
    if part.get(name) is not None
  }
  return {"type": "input_image", "detail": "auto", **source}


_DONE = {"status": "completed"}
_READERS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
  "message": _message,
  "function_call": _call,
  "custom_tool_call": _call,
  "function_call_output": _output,
  "custom_tool_call_output": _output,
  "reasoning": _reasoning,
}
