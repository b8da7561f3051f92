"""A model's chat template as text: what it writes, and how it goes on."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
from typing import Any

import jinja2
import transformers

from forge_jax import types
from forge_jax.gateway import refusal

_PROBE = "3f2a97c1"  # a text that no template writes by itself


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
  """A prompt that the template wrote, to be known again by its digest."""

  length: int  # characters
  digest: bytes

  @classmethod
  def of(cls, text: str) -> "Written":
    """What is kept of a text."""
    return cls(len(text), _digest(text))

  def begins(self, text: str) -> bool:
    """Whether a text begins with this one."""
    return (
      len(text) >= self.length and _digest(text[: self.length]) == self.digest
    )


class ChatTemplate:
  """Writes conversations as the tokenizer's chat template does."""

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerFast,
    variables: Mapping[str, Any],
  ):
    """Probes the template for how it ends a reply and whether it has tools."""
    self._tokenizer = tokenizer
    self._variables = variables
    self._takes_tools = True
    self._takes_tools = self._probe_tools()
    self.closing = self._find_closing()

  def text(
    self, messages: types.Messages, tools: types.Messages, open_reply: bool
  ) -> str:
    """The conversation as text; with `open_reply`, ready for the next reply.

    Raises:
      Refusal: the template refuses the messages or does not show tools.
    """
    if tools and not self._takes_tools:
      raise refusal.Refusal(
        "this model's chat template does not show tools to the model",
        param="tools",
      )
    try:
      return self._tokenizer.apply_chat_template(
        with_objects(messages),
        tools=list(tools) or None,
        add_generation_prompt=open_reply,
        tokenize=False,
        **self._variables,
      )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
      raise refusal.Refusal(
        f"the chat template refuses the messages: {error}", param="messages"
      ) from error

  def rest(
    self,
    conversation: types.Messages,
    new_messages: types.Messages,
    tools: types.Messages,
    said: str,
    stop: str,
    before: Written | None = None,
  ) -> tuple[str, Written] | None:
    """What follows a sampled reply when the conversation goes on.

    Where the whole conversation, as the template writes it, begins with the
    prompt as it was written `before`, and goes on with the reply as it was
    sampled and closed, the rest follows: one rendering shows it. Else two or
    three are compared.

    Args:
      conversation: a request's messages and the reply to it.
      new_messages: what follows them.
      tools: of the whole conversation.
      said: the reply as it was sampled, up to its stop token.
      stop: text of the stop token that the reply was sampled with, or empty;
        what else closes a reply comes first in what is returned.
      before: the prompt that the reply answers, if it is known.

    Returns:
      The text that follows, and the whole prompt; None if the template does not
      extend what it wrote before.
    """
    if self.closing is None or not self.closing.startswith(stop):
      return None
    new = self.text([*conversation, *new_messages], tools, True)
    known = before is not None and before.begins(new)
    if known and new.startswith(said + self.closing, before.length):
      end = before.length + len(said) + len(self.closing)
    else:
      prompt = (
        new[: before.length]
        if known
        else self.text(conversation[:-1], tools, True)
      )
      old = self.text(conversation, tools, False)
      if not (
        old.startswith(prompt)
        and old.endswith(self.closing)
        and new.startswith(old)
      ):
        return None
      end = len(old)
    return self.closing[len(stop) :] + new[end:], Written.of(new)

  def _find_closing(self) -> str | None:
    """What the template writes after a reply; None if it cannot be told."""
    question = {"role": "user", "content": "question"}
    reply = {"role": "assistant", "content": _PROBE}
    try:
      text = self.text([question, reply], (), False)
    except refusal.Refusal:
      return None
    _, found, closing = text.partition(_PROBE)
    return closing if found and _PROBE not in closing else None

  def _probe_tools(self) -> bool:
    """Whether the template shows tools to the model."""
    function = {"name": _PROBE, "description": "", "parameters": {}}
    question = {"role": "user", "content": "question"}
    try:
      text = self.text(
        [question], [{"type": "function", "function": function}], True
      )
    except refusal.Refusal:
      return False
    return _PROBE in text


def with_objects(messages: types.Messages) -> list[dict[str, Any]]:
  """Messages with the arguments of calls as objects, as templates expect."""
  rendered = []
  for message in messages:
    message = dict(message)
    if calls := message.get("tool_calls"):
      message["tool_calls"] = [_decode_arguments(call) for call in calls]
    rendered.append(message)
  return rendered


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]


def _decode_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
  function = dict(call["function"])
  try:
    arguments = json.loads(function["arguments"])
  except ValueError:
    arguments = None
  if isinstance(arguments, dict):
    function["arguments"] = arguments
  return {**call, "function": function}
