"""Turns sampled tokens into text as they arrive.

What has been sent cannot be taken back, so text is held while it may turn out
to be something else: bytes of an unfinished character, white space before a
tool call, the beginning of a stop string, anything after a markup token. The
pieces sent are a prefix of the content that the finished reply has.
"""

from collections.abc import Sequence

from forge_jax import types
from forge_jax.gateway import render

_UNFINISHED = "\ufffd"  # how a partial character is decoded


class Detokenizer:
  """Decodes token by token, at the boundaries of characters."""

  def __init__(self, renderer: render.Renderer):
    self._renderer = renderer
    self._ids: list[int] = []
    self._prefix = 0  # tokens before this one no longer affect the text
    self._read = 0  # tokens before this one have been decoded

  def feed(self, token_ids: Sequence[int]) -> str:
    """The text that the tokens complete; empty inside a character."""
    self._ids.extend(token_ids)
    known = self._renderer.decode(self._ids[self._prefix : self._read])
    text = self._renderer.decode(self._ids[self._prefix :])
    if len(text) <= len(known) or text.endswith(_UNFINISHED):
      return ""
    self._prefix, self._read = self._read, len(self._ids)
    return text[len(known) :]


class TextStream:
  """The content and the reasoning of one response, piece by piece."""

  def __init__(
    self,
    renderer: render.Renderer,
    prompt_ids: Sequence[int],
    tools: types.Messages,
    stop_strings: Sequence[str],
    *,
    raw: bool = False,
  ):
    """Begins a response; with `raw`, all of it is content, markup included."""
    self._renderer = renderer
    self._raw = raw
    self._prompt_ids = prompt_ids
    self._tools = tools
    self._stop_strings = stop_strings
    self._detokenizer = Detokenizer(renderer)
    self._ids: list[int] = []
    self._in_reasoning = not raw and renderer.opens_reasoning(prompt_ids)
    self._reasoned = False  # reasoning comes once, and first
    self._held = renderer.calls_are_plain_text(tools)
    self._pending = ""  # decoded, not sent
    self._strip = False  # drop the white space that opens the content
    self.content = ""  # sent
    self.reasoning = ""  # sent

  def feed(self, token_ids: Sequence[int]) -> tuple[str, str]:
    """Takes new tokens; returns the (reasoning, content) to send now."""
    reasoning = content = ""
    for token in self._renderer.before_stop(token_ids):
      self._ids.append(token)
      if self._held:
        break
      if self._in_reasoning:
        if token == self._renderer.think_close_id:
          reasoning += self._close_reasoning()
      elif self._raw or self._renderer.is_plain((token,)):
        self._pending += self._detokenizer.feed((token,))
      elif token == self._renderer.think_open_id and self._may_reason():
        self._in_reasoning = True
      else:
        self._held = True
    if not self._held and not self._in_reasoning:
      content = self._take()
    self.content += content
    self.reasoning += reasoning
    return reasoning, content

  def finish(self, reply: render.Reply) -> tuple[str, str]:
    """What the finished reply has beyond what was sent."""
    reasoning = _beyond(self.reasoning, reply.reasoning or "")
    content = _beyond(self.content, reply.content)
    self.reasoning += reasoning
    self.content += content
    return reasoning, content

  def _may_reason(self) -> bool:
    return not (self._reasoned or self.content or self._pending.strip())

  def _close_reasoning(self) -> str:
    """Ends the reasoning; asks the model's parser what it was."""
    self._in_reasoning = False
    self._reasoned = self._strip = True
    reply = self._renderer.parse(self._prompt_ids, self._ids, self._tools)
    return reply.reasoning or ""

  def _take(self) -> str:
    """Pending text that can be nothing but content."""
    text = self._pending
    if self._strip and text.strip():
      # Families differ in whether they keep the space after the reasoning.
      reply = self._renderer.parse(self._prompt_ids, self._ids, self._tools)
      if not reply.content[:1].isspace():
        text = text.lstrip()
      self._strip = False
    end = len(text.rstrip())
    for stop in self._stop_strings:
      found = text.find(stop)
      if found >= 0:
        end, self._held = min(end, found), True
      else:
        end = min(end, len(text) - _overlap(text, stop))
    end = len(text[:end].rstrip())
    self._pending = text[end:]
    return text[:end]


def cut(text: str, stop_strings: Sequence[str]) -> str:
  """The text before the first stop string in it."""
  stop = first_stop(text, stop_strings)
  return text if stop is None else text.partition(stop)[0]


def first_stop(text: str, stop_strings: Sequence[str]) -> str | None:
  """The stop string that comes first in a text; None if it holds none."""
  found = [stop for stop in stop_strings if stop in text]
  return min(found, key=text.find, default=None)


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that begins `stop`."""
  for length in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:length]):
      return length
  return 0


def _beyond(sent: str, final: str) -> str:
  return final[len(sent) :] if final.startswith(sent) else ""
