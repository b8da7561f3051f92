"""An assistant's turn as it was sampled, and as a client sends it back.

A client that replays a turn seldom sends it back byte for byte. A sent turn is
the sampled one where

  the calls have the same names in the same order, and arguments that are equal
    as JSON: their spelling, the order of their keys and the way that numbers
    are written do not count;
  or the calls bear the ids that the gateway issued, and arguments that hold all
    that the model wrote: defaults may have been added, texts may have been
    trimmed or un-escaped;
  the text is equal but for white space at its ends, or is missing beside calls;
  the reasoning is equal but for white space at its ends, or is missing, or
    stands before the text between <think> and </think>.

Everything else is another turn.
"""

import dataclasses
import hashlib
import html
import json
import re
from typing import Any

from forge_jax import types

_ESCAPE = re.compile(r"\\+([nrt'\"`\\\n])")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)

# How much a sent turn is like a sampled one.
DIFFERENT, TRIMMED, EQUAL, ISSUED = range(4)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
  """A tool call."""

  id: str
  name: str
  arguments: str  # JSON as it was written, or what is no JSON


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
  """What an assistant's message says."""

  text: str
  reasoning: str
  calls: tuple[Call, ...]

  def digest(self) -> bytes:
    """A digest of all that is shown to a model: of everything but ids."""
    return self._digest(self.text, self.reasoning)

  def loose_digest(self) -> bytes:
    """A digest that a turn keeps when it is trimmed or loses its reasoning."""
    return self._digest(self.text.strip(), "")

  def _digest(self, text: str, reasoning: str) -> bytes:
    calls = [(c.name, canonical(c.arguments)) for c in self.calls]
    return digest_of("assistant", text, reasoning, json.dumps(calls))


def read(message: types.Message) -> Turn:
  """The turn that an assistant's message says."""
  return Turn(
    text=message.get("content") or "",
    reasoning=message.get("reasoning_content") or "",
    calls=tuple(
      Call(
        call.get("id", ""),
        call["function"]["name"],
        call["function"]["arguments"],
      )
      for call in message.get("tool_calls") or ()
    ),
  )


def likeness(sent: Turn, sampled: Turn) -> int:
  """How much a sent turn is like a sampled one; DIFFERENT: another turn."""
  if len(sent.calls) != len(sampled.calls):
    return DIFFERENT
  if sampled.reasoning and not sent.reasoning:
    sent = _with_thought(sent)
  said, meant = sent.reasoning.strip(), sampled.reasoning.strip()
  if said and said != meant:
    return DIFFERENT
  text = sent.text.strip()
  if text != sampled.text.strip() and (text or not sampled.calls):
    return DIFFERENT
  exact = sent.text == sampled.text and sent.reasoning == sampled.reasoning
  best = EQUAL if exact else TRIMMED
  pairs = list(zip(sent.calls, sampled.calls, strict=True))
  if any(ours.name != theirs.name for ours, theirs in pairs):
    return DIFFERENT
  if pairs and all(ours.id == theirs.id for ours, theirs in pairs):
    held = all(_holds(*pair) for pair in pairs)
    return ISSUED if held else DIFFERENT
  equal = all(_equal(a.arguments, b.arguments) for a, b in pairs)
  return best if equal else DIFFERENT


def digest_of(*texts: str) -> bytes:
  """A digest of texts, 16 bytes."""
  parts = [text.encode() for text in texts]
  lengths = ",".join(str(len(part)) for part in parts)
  return hashlib.sha256(b"".join([lengths.encode(), *parts])).digest()[:16]


def canonical(arguments: str) -> str:
  """Arguments in one spelling; what is no JSON stays as it is."""
  value = _parsed(arguments)
  try:
    return arguments if value is None else json.dumps(value, sort_keys=True)
  except RecursionError:
    return arguments


def _with_thought(turn: Turn) -> Turn:
  """The turn with what its text holds between marks as its reasoning."""
  found = _THOUGHT.fullmatch(turn.text)
  if found is None:
    return turn
  return dataclasses.replace(turn, reasoning=found[1], text=found[2].lstrip())


def _equal(sent: str, sampled: str) -> bool:
  return sent == sampled or canonical(sent) == canonical(sampled)


def _holds(sent: Call, sampled: Call) -> bool:
  """Whether a call with an issued id holds all that the model wrote."""
  if sent.arguments == sampled.arguments:
    return True
  values = _parsed(sent.arguments), _parsed(sampled.arguments)
  try:
    return None not in values and _contains(*values)
  except RecursionError:
    return False


def _contains(sent: Any, sampled: Any) -> bool:
  if type(sent) is not type(sampled):  # True is no 1
    return False
  if isinstance(sampled, dict):
    return all(
      name in sent and _contains(sent[name], value)
      for name, value in sampled.items()
    )
  if isinstance(sampled, list):
    return len(sent) == len(sampled) and all(map(_contains, sent, sampled))
  if isinstance(sampled, str):
    return sent == sampled or _unescaped(sent) == _unescaped(sampled)
  return sent == sampled


def _unescaped(text: str) -> str:
  text = _ESCAPE.sub(lambda m: _ESCAPED.get(m[1], m[1]), text)
  return html.unescape(text).strip()


def _parsed(arguments: str) -> Any | None:
  """The JSON value of arguments, read as a client in any language reads it.

  Control characters may be unescaped in its strings, and an object may have
  been encoded twice. None: it is no JSON.
  """
  try:
    value = _load(arguments)
    if isinstance(value, str):
      inner = _load(value)
      value = inner if isinstance(inner, dict) else value
  except (ValueError, RecursionError):
    return None
  return value


def _load(text: str) -> Any:
  return json.loads(text, strict=False, parse_int=_number, parse_float=_number)


def _number(text: str) -> float | int:
  """A number as a double has it: 1.0 is 1, and 2**53 + 1 is 2**53."""
  value = float(text)
  return int(value) if value.is_integer() else value
