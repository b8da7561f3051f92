"""A model's chat template as text: what it writes, and how it goes on."""

from collections.abc import Mapping
import json
from typing import Any

import jinja2
import transformers

from forge_jax import types
from forge_jax.gateway import refusal

_PROBE = "3f2a97c1"  # a text that no template writes by itself


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
    stop: str,
  ) -> str | None:
    """The text that follows a sampled reply when the conversation goes on.

    Args:
      conversation: a request's messages and the reply to it.
      new_messages: what follows them.
      tools: of the whole conversation.
      stop: text of the stop token that the reply was sampled with, or empty;
        what else closes a reply comes first in what is returned.

    Returns:
      None if the template does not extend what it wrote before.
    """
    if self.closing is None or not self.closing.startswith(stop):
      return None
    prompt = self.text(conversation[:-1], tools, True)
    old = self.text(conversation, tools, False)
    new = self.text([*conversation, *new_messages], tools, True)
    if not (
      old.startswith(prompt)
      and old.endswith(self.closing)
      and new.startswith(old)
    ):
      return None
    return self.closing[len(stop) :] + new[len(old) :]

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


def _decode_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
  function = dict(call["function"])
  try:
    arguments = json.loads(function["arguments"])
  except ValueError:
    arguments = None
  if isinstance(arguments, dict):
    function["arguments"] = arguments
  return {**call, "function": function}
