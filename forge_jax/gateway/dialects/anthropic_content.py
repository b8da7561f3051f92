"""Anthropic's content blocks, brought to the gateway's internal messages.

A message is a string or a list of blocks; a string and one text block are the
same. What changes on the way, so that a conversation keeps its prefix and a
model of text can read it:

  Text blocks of one message are concatenated. What stands for another block
    has lines of its own.
  A line that begins with `x-anthropic-billing-header:` at the start of the
    system prompt differs in each request, and is dropped.
  cache_control, and every other field of a block that is not named here, says
    nothing to the model and is dropped.
  Assistant messages that follow each other are one; its text comes before its
    calls.
  tool_result: becomes a message of its own, role `tool`; `is_error` is shown as
    "[error]" before the result, an image in it as "[image]", a document that is
    no text as "[document]", a tool_reference as the definition of the tool.
  document, search_result: their title, source or context, then their text.
  redacted_thinking: dropped; its content is for another model.
  thinking: reasoning. A signature of ours holds the reasoning itself, so that
    a block whose text was withheld can come back; a block whose text has been
    changed is refused.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
import json
from typing import Any

from forge_jax.gateway import refusal
from forge_jax.gateway.dialects import fields

_BILLING = "x-anthropic-billing-header:"
_SIGNATURE = "forge."

_Block = dict[str, Any]
_Message = dict[str, Any]
# The text that a block is shown as, and whether it has lines of its own.
_Piece = tuple[str, bool]
# A tool's definition in the OpenAI format, by the tool's name.
Definitions = Mapping[str, Mapping[str, Any]]


def conversation(
  system: Any, messages: Sequence[Any], definitions: Definitions
) -> list[_Message]:
  """A request's conversation as internal messages.

  Args:
    system: the request's `system`; None if it has none.
    messages: the request's `messages`.
    definitions: of all its tools.

  Raises:
    Refusal: something is missing, malformed or not supported; it names what.
  """
  internal: list[_Message] = []
  if text := _system(system):
    internal.append({"role": "system", "content": text})
  if not messages:
    raise fields.bad("messages", "at least one message is required")
  last_user = max(
    (n for n, m in enumerate(messages) if _is_user(m)), default=-1
  )
  for n, value in enumerate(messages):
    where = f"messages[{n}]"
    if not isinstance(value, dict):
      raise fields.bad(where, "a message is an object")
    role = fields.one_of(
      value, "role", ("user", "assistant", "system"), where=where
    )
    blocks = _blocks(value.get("content"), f"{where}.content")
    if role == "user":
      internal += _user(blocks, definitions)
    elif role == "assistant":
      _append(internal, _assistant(blocks))
    else:
      message = {"role": "system", "content": _text_only(blocks)}
      if _lasts(value, where) or n > last_user:
        internal.append(message)
  return internal


def signature(reasoning: str) -> str:
  """What a thinking block is recognised by; it holds the reasoning."""
  return _SIGNATURE + base64.urlsafe_b64encode(reasoning.encode()).decode()


def _is_user(message: Any) -> bool:
  return isinstance(message, dict) and message.get("role") == "user"


def _lasts(message: _Message, where: str) -> bool:
  """Whether a system message is shown beyond the next user message."""
  if message.get("output_config"):
    raise fields.bad(
      f"{where}.output_config", "this parameter is not supported"
    )
  until = ("never", "next_user_message")
  return fields.one_of(message, "clear_at", until, None, where=where) in (
    None,
    "never",
  )


def _system(value: Any) -> str:
  if value is None:
    return ""
  blocks = list(_blocks(value, "system"))
  if blocks:
    first, where = blocks[0]
    text = fields.field(first, "text", str, "", where=where)
    if text.startswith(_BILLING):
      blocks[0] = ({**first, "text": text.partition("\n")[2]}, where)
  return _text_only(blocks)


def _blocks(value: Any, where: str) -> Iterator[tuple[_Block, str]]:
  """The blocks of a content, each with its name for a refusal."""
  if isinstance(value, str):
    yield {"type": "text", "text": value}, where
    return
  if not isinstance(value, list):
    raise fields.bad(where, "must be a string or a list of content blocks")
  for n, block in enumerate(value):
    path = f"{where}[{n}]"
    if not isinstance(block, dict):
      raise fields.bad(path, "a content block is an object")
    fields.field(block, "type", str, where=path)
    yield block, path


def _user(
  blocks: Iterable[tuple[_Block, str]], definitions: Definitions
) -> list[_Message]:
  """A message for each tool result and for the text between them."""
  messages: list[_Message] = []
  pieces: list[_Piece] = []

  def end_text() -> None:
    if text := _join(pieces):
      messages.append({"role": "user", "content": text})
    pieces.clear()

  for block, where in blocks:
    if block["type"] == "tool_result":
      end_text()
      messages.append(_tool_result(block, where, definitions))
    else:
      pieces.append(_shown(block, where))
  end_text()
  return messages or [{"role": "user", "content": ""}]


def _assistant(blocks: Iterable[tuple[_Block, str]]) -> _Message:
  texts, reasoning, calls = [], [], []
  for block, where in blocks:
    kind = block["type"]
    if kind == "text":
      texts.append(fields.field(block, "text", str, where=where))
    elif kind == "thinking":
      reasoning.append(_reasoning(block, where))
    elif kind == "tool_use":
      calls.append(_tool_use(block, where))
    elif kind != "redacted_thinking":
      raise _unsupported(block, where)
  message = {"role": "assistant", "content": "".join(texts)}
  if reasoning:
    message["reasoning_content"] = "".join(reasoning)
  if calls:
    message["tool_calls"] = calls
  return message


def _append(messages: list[_Message], message: _Message) -> None:
  """Adds an assistant message, to the one before it if that is one too."""
  if not messages or messages[-1]["role"] != "assistant":
    messages.append(message)
    return
  for name, value in message.items():
    if name != "role":
      empty: Any = [] if name == "tool_calls" else ""
      messages[-1][name] = messages[-1].get(name, empty) + value


def _text_only(blocks: Iterable[tuple[_Block, str]]) -> str:
  texts = []
  for block, where in blocks:
    if block["type"] != "text":
      raise _unsupported(block, where)
    texts.append(fields.field(block, "text", str, where=where))
  return "".join(texts)


def _reasoning(block: _Block, where: str) -> str:
  shown = fields.field(block, "thinking", str, where=where)
  signed = fields.field(block, "signature", str, "", where=where)
  if not signed.startswith(_SIGNATURE):
    return shown  # another model's, at the beginning of a conversation
  try:
    reasoning = base64.b64decode(
      signed.removeprefix(_SIGNATURE), altchars="-_", validate=True
    ).decode()
  except ValueError as error:
    raise fields.bad(f"{where}.signature", "is damaged") from error
  if shown and shown.strip() != reasoning.strip():
    raise fields.bad(
      f"{where}.thinking", "a thinking block must come back unchanged"
    )
  return reasoning


def _tool_use(block: _Block, where: str) -> dict[str, Any]:
  caller = fields.field(block, "caller", dict, {}, where=where)
  if caller.get("type", "direct") != "direct":
    raise fields.bad(f"{where}.caller", "only direct calls are supported")
  return {
    "id": fields.field(block, "id", str, where=where),
    "type": "function",
    "function": {
      "name": fields.field(block, "name", str, where=where),
      "arguments": json.dumps(
        fields.field(block, "input", dict, where=where), ensure_ascii=False
      ),
    },
  }


def _tool_result(
  block: _Block, where: str, definitions: Definitions
) -> _Message:
  content = block.get("content")
  path = f"{where}.content"
  pieces = []
  for part, at in _blocks("" if content is None else content, path):
    if part["type"] == "image":
      pieces.append(("[image]", True))
    elif part["type"] == "tool_reference":
      pieces.append((_definition(part, at, definitions), True))
    else:
      pieces.append(_shown(part, at, in_result=True))
  text = _join(pieces)
  if fields.field(block, "is_error", bool, False, where=where):
    text = f"[error] {text}" if text else "[error]"
  return {
    "role": "tool",
    "content": text,
    "tool_call_id": fields.field(block, "tool_use_id", str, where=where),
  }


def _definition(block: _Block, where: str, definitions: Definitions) -> str:
  name = fields.field(block, "tool_name", str, where=where)
  if name not in definitions:
    raise fields.bad(f"{where}.tool_name", f"no tool is named {name!r}")
  return json.dumps(definitions[name], ensure_ascii=False)


def _shown(block: _Block, where: str, in_result: bool = False) -> _Piece:
  """What a block of a user's or of a tool's content is shown as."""
  kind = block["type"]
  if kind == "text":
    return fields.field(block, "text", str, where=where), False
  if kind == "search_result":
    _no_citations(block, where)
    names = ("title", "source")
    head = [fields.field(block, name, str, where=where) for name in names]
    content = fields.field(block, "content", list, where=where)
    text = _text_only(_blocks(content, f"{where}.content"))
    return "\n".join([*head, text]), True
  if kind == "document":
    return _document(block, where, in_result), True
  raise _unsupported(block, where)


def _document(block: _Block, where: str, in_result: bool) -> str:
  _no_citations(block, where)
  source = fields.field(block, "source", dict, where=where)
  path, kind = f"{where}.source", source.get("type")
  if kind == "text":
    text = fields.field(source, "data", str, where=path)
  elif kind == "content":
    text = _text_only(_blocks(source.get("content"), f"{path}.content"))
  elif in_result:
    text = "[document]"
  else:
    raise fields.bad(path, f"only documents of text are supported, not {kind}")
  names = ("title", "context")
  head = [fields.field(block, name, str, "", where=where) for name in names]
  return "\n".join([*filter(None, head), text])


def _no_citations(block: _Block, where: str) -> None:
  wanted = fields.field(block, "citations", dict, {}, where=where)
  if wanted.get("enabled"):
    raise fields.bad(f"{where}.citations", "citations are not supported")


def _join(pieces: Sequence[_Piece]) -> str:
  text, apart = "", False
  for piece, own_lines in pieces:
    if text and (apart or own_lines) and not text.endswith("\n"):
      text += "\n"
    text, apart = text + piece, own_lines
  return text


def _unsupported(block: _Block, where: str) -> refusal.Refusal:
  return fields.bad(
    f"{where}.type", f"a {block['type']!r:.40} block is not supported here"
  )
