"""Messages to token ids and back, never re-encoding what was sampled.

A model family that the `renderers` package knows has a renderer that bridges
from one turn to the next by itself; where it will not, the whole conversation
is rendered, and if its text begins with all that the model has seen, the rest
is encoded. Any other model has only its chat template, and is bridged by text:
the whole conversation is rendered as text with and without the new messages,
the one must extend the other, and only the rest is encoded. A template that
rewrites its history cannot be extended, and says so.

A reply whose tool-call markup is not well-formed is handed over as the text
that was sampled, markup and all; its reasoning, if any, stays apart.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
import renderers
from renderers import reasoning as renderers_reasoning
import transformers

from forge_jax import errors, types
from forge_jax.gateway import (
  addition,
  call_syntax,
  families,
  parsed_calls,
  refusal,
  template,
)

# Families that write a tool call as plain text, with no opening token.
_PLAIN_TEXT_CALLS = frozenset({"llama-3"})
# The tokens around a reasoning: the first that the tokenizer has.
_THINK = (
  ("<think:opensource>", "</think:opensource>"),
  ("<think>", "</think>"),
)
# Going on, `renderers` leaves out a line break that these templates write.
_BREAKS_LEFT_OUT = frozenset({"laguna-m.1", "laguna-xs.2"})


Ids = Sequence[int] | np.ndarray  # token ids, int32


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
  """A well-formed call; `arguments` is the text of a JSON object."""

  name: str
  arguments: str
  id: str | None = None  # that the model wrote, if its format has any


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
  """What a response says; without calls, `content` is all there is."""

  content: str
  reasoning: str | None = None
  tool_calls: tuple[ToolCall, ...] = ()
  malformed: bool = False  # a call was attempted and is part of `content`


class Renderer:
  """Renders the conversations of one model; holds no conversation."""

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerFast,
    name: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    keep_reasoning: bool = False,
  ):
    """Picks the renderer.

    Args:
      tokenizer: a fast tokenizer with a chat template.
      name: a family of the `renderers` package, "default" for the tokenizer's
        own chat template, "auto" to pick by the model's name.
      template_kwargs: variables of the chat template, such as
        enable_thinking.
      keep_reasoning: whether the reasoning of past turns stays where the
        template drops it, see `families`.

    Raises:
      ConfigError: there is no such renderer, or it does not fit the tokenizer.
    """
    self._tokenizer = tokenizer
    self._template_kwargs = dict(template_kwargs or {})
    self._by_effort: dict[str, Renderer] = {}
    self.effort: str | None = None  # what a request has set, see with_effort
    self._keep_reasoning = keep_reasoning
    self.name = families.pick(tokenizer) if name == "auto" else name
    self._family = families.create(
      tokenizer, self.name, self._template_kwargs, keep_reasoning
    )
    self._template = None
    if self.name == families.GENERIC:
      variables = self._template_kwargs
      if keep_reasoning:
        kept = families.keeping(tokenizer, self.name, variables)
        variables = {**kept, **variables}
      self._template = template.ChatTemplate(tokenizer, variables)
    self.stop_token_ids = self._find_stop_tokens()
    self._stops = frozenset(self.stop_token_ids)
    self._markup = frozenset(tokenizer.added_tokens_decoder) - self._stops
    vocabulary = tokenizer.get_added_vocab()
    self.vocabulary_size = len(tokenizer)
    self._think = next((t for t in _THINK if t[0] in vocabulary), _THINK[-1])
    self.think_open_id, self.think_close_id = map(vocabulary.get, self._think)
    # How it writes what a request may demand; see `constraint`.
    generic = self._template is not None
    parser = families.tool_parser(tokenizer) if generic else None
    self.call_syntax = call_syntax.find(self.name, parser, vocabulary)
    self.content_is_plain = call_syntax.plain_content(self.name, vocabulary)
    self.special = vocabulary
    self._in_channels = call_syntax.CHANNEL in vocabulary

  def with_effort(self, effort: str | None) -> "Renderer":
    """The renderer for a request that asks for an effort of reasoning.

    A template that knows the variable `reasoning_effort` is given it; for one
    that knows only `enable_thinking`, the effort "none" turns thinking off.
    Any other template has no such choice, and is left as it is.

    Raises:
      Refusal: the model knows efforts, but not this one.
    """
    if effort is None:
      return self
    if effort not in self._by_effort:
      self._by_effort[effort] = self._create_with_effort(effort)
    return self._by_effort[effort]

  def render(
    self, messages: types.Messages, tools: types.Messages
  ) -> addition.Addition:
    """A whole conversation and the opening of the next reply.

    Raises:
      Refusal: the template refuses the messages or the tools.
    """
    if self._template is not None:
      text = self._template.text(messages, tools, True)
      written = template.Written.of(text)
      return addition.Addition(text, self.encode_rest, written)
    try:
      return addition.Addition.of(
        self._family.render_ids(
          template.with_objects(messages),
          tools=list(tools) or None,
          add_generation_prompt=True,
        )
      )
    except (ValueError, TypeError, KeyError, AssertionError) as error:
      raise refusal.Refusal(
        f"the messages cannot be rendered: {error}", param="messages"
      ) from error

  def extend(
    self,
    prompt_ids: Ids,
    response_ids: Ids,
    conversation: types.Messages,
    new_messages: types.Messages,
    tools: types.Messages,
    written: template.Written | None = None,
  ) -> addition.Addition | None:
    """What follows a sampled response when the conversation goes on.

    A response that was cut, with no stop token, is closed as the template
    closes a turn; the closing tokens come first in what is returned.

    Args:
      prompt_ids: of the recorded completion.
      response_ids: of the recorded completion.
      conversation: its request's messages and its reply, as the client saw it.
      new_messages: what the client has added to them.
      tools: of both requests.
      written: the completion's prompt as the chat template wrote it, if known.

    Returns:
      What to append to prompt and response; None if the template does not
      extend what the model has seen.
    """
    response = _listed(response_ids)
    if self._template is not None:
      ended = bool(response) and response[-1] in self._stops
      said = self.decode(response[:-1] if ended else response)
      stop = self.decode(response[-1:]) if ended else ""
      rest = self._template.rest(
        conversation, new_messages, tools, said, stop, written
      )
      return rest and addition.Addition(rest[0], self.encode_rest, rest[1])
    prompt = _listed(prompt_ids)
    seen = prompt + response
    bridged = self._family.bridge_to_next_turn(
      prompt,
      response,
      template.with_objects(new_messages),
      tools=list(tools) or None,
    )
    if bridged is None or bridged.token_ids[: len(seen)] != seen:
      return self._extend_by_text(seen, [*conversation, *new_messages], tools)
    rest = bridged.token_ids[len(seen) :]
    if self.name in _BREAKS_LEFT_OUT and seen[-1] in self._stops:
      rest = [*self.encode_rest("\n"), *rest]
    return addition.Addition.of(rest)

  def _extend_by_text(
    self,
    seen: Sequence[int],
    conversation: types.Messages,
    tools: types.Messages,
  ) -> addition.Addition | None:
    """What follows `seen` in a whole conversation that begins with it."""
    text = self.decode(seen)
    whole = self.decode(self.render(conversation, tools).ids)
    if not whole.startswith(text):
      return None
    return addition.Addition(whole[len(text) :], self.encode_rest)

  def encode_prompt(self, text: str) -> list[int]:
    """Token ids of a raw prompt, with the tokens that a text begins with."""
    backend = self._tokenizer.backend_tokenizer
    return backend.encode(text, add_special_tokens=True).ids

  def encode_rest(self, text: str) -> list[int]:
    """Token ids of a text that continues another."""
    # As `encode`, but without the places of tokens in the text: a fifth faster.
    backend = self._tokenizer.backend_tokenizer
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

  def parse(
    self,
    prompt_ids: Ids,
    response_ids: Sequence[int],
    tools: types.Messages,
  ) -> Reply:
    """What a response says, up to its stop token; calls only if tools."""
    ids = self.before_stop(response_ids)
    if (
      self.is_plain(ids)
      and not self.calls_are_plain_text(tools)
      and not self.opens_reasoning(prompt_ids)
    ):
      return Reply(self.decode(ids))
    last = self._last(prompt_ids)
    if last is not None and last == self.think_open_id:
      # All that tells; some parsers do not find it behind a tool's result.
      prompt_ids = (self.think_open_id,)
    stop = list(response_ids[len(ids) :][:1])
    if stop and self._in_channels:  # whichever it is, it ends a call
      stop = [self.special.get("<|call|>", stop[0])]
    try:
      parsed = self._family.parse_response(
        [*ids, *stop],
        tools=list(tools) or None,
        prompt_ids=_listed(prompt_ids),
      )
    except (ValueError, TypeError, KeyError, RecursionError):
      # Some parsers fail on what a model in training may well sample.
      return Reply(self.decode(ids), malformed=bool(tools))
    read = [(c, parsed_calls.arguments(c, tools)) for c in parsed.tool_calls]
    calls = [said and ToolCall(call.name, said, call.id) for call, said in read]
    if calls and (not tools or None in calls):
      content = self.decode(ids)
      if self._reasons(prompt_ids, ids):
        content = self._after_reasoning(ids, parsed)
      return Reply(content, parsed.reasoning_content, malformed=bool(tools))
    content = self._opened_as_sampled(ids, parsed.content)
    if calls:
      content = content.rstrip()
    return Reply(content, parsed.reasoning_content, tuple(calls))

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    return self._tokenizer.decode(
      list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def before_stop(self, ids: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    for n, token in enumerate(ids):
      if token in self._stops:
        return list(ids[:n])
    return list(ids)

  def is_plain(self, ids: Sequence[int]) -> bool:
    """Whether the ids hold no markup token: the text is the content."""
    return not self._in_channels and self._markup.isdisjoint(ids)

  def opens_reasoning(self, prompt_ids: Ids) -> bool:
    """Whether the prompt leaves the model inside its reasoning."""
    if self.think_open_id is None:
      return False
    if self._last(prompt_ids) == self.think_open_id:
      return True
    # What comes before the last stop token says nothing.
    stops = np.flatnonzero(np.isin(prompt_ids, self.stop_token_ids))
    tail = prompt_ids[stops[-1] + 1 if len(stops) else 0 :]
    return renderers_reasoning.prompt_ends_in_reasoning(
      self._tokenizer,
      _listed(tail),
      open_marker=self._think[0],
      close_marker=self._think[1],
      stop_ids=self._stops,
    )

  def closes_reasoning(self, prompt_ids: Ids) -> bool:
    """Whether the prompt ends with a reasoning that is closed."""
    last = self._last(prompt_ids)
    return last is not None and last == self.think_close_id

  def calls_are_plain_text(self, tools: types.Messages) -> bool:
    """Whether any text may turn out to be a tool call."""
    return bool(tools) and self.name in _PLAIN_TEXT_CALLS

  def _last(self, ids: Ids) -> int | None:
    """The last token that is no white space."""
    tokens = (int(token) for token in reversed(ids))
    return next((t for t in tokens if self.decode((t,)).strip()), None)

  def _reasons(self, prompt_ids: Ids, ids: Sequence[int]) -> bool:
    """Whether a response begins in its reasoning, even an empty one."""
    for n, token in enumerate(ids):
      if token in self._markup:
        opened = (
          token == self.think_open_id and not self.decode(ids[:n]).strip()
        )
        return opened or self.opens_reasoning(prompt_ids)
    return self.opens_reasoning(prompt_ids)

  def _opened_as_sampled(self, ids: Sequence[int], content: str) -> str:
    """Content with the white space it was sampled with before its text.

    Some families strip it; whoever streams a reply cannot know yet.
    """
    markup = (n for n, token in enumerate(ids) if token in self._markup)
    head = self.decode(ids[: next(markup, len(ids))])
    if not head.strip():
      return content
    return head[: len(head) - len(head.lstrip())] + content.lstrip()

  def _after_reasoning(
    self, ids: Sequence[int], parsed: renderers.ParsedResponse
  ) -> str:
    """The text of all that follows the reasoning, markup included."""
    if self.think_close_id in ids:
      start = ids.index(self.think_close_id) + 1
    else:  # the opening of a call has ended the reasoning
      outside = self._markup - {self.think_open_id}
      start = next(n for n, token in enumerate(ids) if token in outside)
    text = self.decode(ids[start:])
    return text if parsed.content[:1].isspace() else text.lstrip()

  def _create_with_effort(self, effort: str) -> "Renderer":
    tokenizer, name = self._tokenizer, self.name
    if families.knows(tokenizer, name, "reasoning_effort"):
      variables: dict[str, Any] = {"reasoning_effort": effort}
    elif effort == "none" and families.knows(
      tokenizer, name, "enable_thinking"
    ):
      variables = {"enable_thinking": False}
    else:
      return self
    try:
      renderer = Renderer(
        tokenizer,
        name,
        {**self._template_kwargs, **variables},
        self._keep_reasoning,
      )
    except errors.ConfigError as error:
      raise refusal.Refusal(
        f"reasoning_effort: this model does not know {effort!r}",
        param="reasoning_effort",
      ) from error
    renderer.effort = effort
    return renderer

  def _find_stop_tokens(self) -> tuple[int, ...]:
    ids = list(self._family.get_stop_token_ids())
    if self._template is not None and self._template.closing:
      first = self.encode_rest(self._template.closing)[0]
      if first in self._tokenizer.added_tokens_decoder and first not in ids:
        ids.append(first)
    if not ids:
      raise errors.ConfigError("the tokenizer has no end-of-sequence token")
    return tuple(ids)


def _listed(ids: Ids) -> list[int]:
  return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
