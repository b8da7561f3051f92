"""OpenAI's legacy Completions: raw prompts in, texts and their streams out.

No template touches a prompt, and all that is sampled is text, markup included,
up to the stop token. A prompt that is text begins with the tokens that the
model's texts begin with; one that is token ids is taken as it is.

Log-probabilities are those of the sampled tokens, the stop token included, and
of as many of the likeliest as `logprobs` says; of several that spell the same,
the likeliest is told. Their `text_offset` counts from the beginning of the
reply.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import time
from typing import Any

import openai.types

from forge_jax import types
from forge_jax.gateway import generation, raw_prompts, render, sessions, stream
from forge_jax.gateway.dialects import fields, openai_errors, openai_fields

PATH = "/completions"
error = functools.partial(openai_errors.error, prompt="prompt")

# Accounting only: it changes nothing about what is sampled.
_IGNORED = frozenset({"user"})
# Not supported, but for the value that asks for nothing.
_NEUTRAL: Mapping[str, Any] = {
  "echo": False,
  "suffix": "",
}
_KNOWN = {
  *_IGNORED,
  *openai_fields.SHAPING,
  "best_of",
  "logprobs",
  "max_tokens",
  "model",
  "n",
  "prompt",
  "return_token_ids",
  "seed",
  "stop",
  "stream",
  "stream_options",
  "temperature",
  "top_p",
}
_MOST_PROMPTS = 128
_MAX_TOKENS = 16  # the protocol's default
_MOST_LOGPROBS = 5
_FINISH = {
  types.StopReason.STOP: "stop",
  types.StopReason.LENGTH: "length",
}


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionRequest:
  """A request: what to sample, and how to say it."""

  model: str
  turns: tuple[generation.Turn, ...]  # the choices of a prompt stand together
  count: int  # choices of each prompt
  stream: bool = False
  include_usage: bool = False
  logprobs: bool = False
  return_token_ids: bool = False

  def reply(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> str:
    """The JSON of a finished completion."""
    said = []
    for n, choice in enumerate(choices):
      value = {
        "index": n,
        "text": choice.reply.content,
        "finish_reason": _FINISH[choice.stop_reason],
        "logprobs": None,
      }
      if self.logprobs:
        value["logprobs"] = _Logprobs(renderer).of(choice)
      if self.return_token_ids:
        value["token_ids"] = choice.token_ids
        value["prompt_token_ids"] = choice.plan.prompt_ids.tolist()
      said.append(value)
    value = self.head(choices) | {
      "choices": said,
      "usage": self.usage(choices),
    }
    return openai.types.Completion.model_validate(value).model_dump_json(
      exclude_unset=True
    )

  def events(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> "CompletionStream":
    """The writer of a streamed completion."""
    return CompletionStream(self, choices, renderer)

  def usage(self, choices: Sequence[generation.Generation]) -> dict[str, Any]:
    """Token counts; a prompt counts once, however many its choices."""
    firsts = choices[:: self.count]
    prompt = sum(len(choice.plan.prompt_ids) for choice in firsts)
    sampled = sum(len(choice.token_ids) for choice in choices)
    cached = sum(choice.cached_tokens for choice in firsts)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": sampled,
      "total_tokens": prompt + sampled,
      "prompt_tokens_details": {"cached_tokens": cached},
    }

  def head(self, choices: Sequence[generation.Generation]) -> dict[str, Any]:
    """What a completion and each of its events begin with."""
    return {
      "id": f"cmpl-{choices[0].plan.request_id}",
      "object": "text_completion",
      "created": int(time.time()),
      "model": self.model,
    }


def parse(
  body: Any, session: sessions.Session | None = None
) -> CompletionRequest:
  """Reads a request's JSON.

  Raises:
    Refusal: something is missing, malformed or not supported; it names the
      parameter.
  """
  del session  # a request of this protocol holds its whole prompt
  body = openai_fields.checked(body, _KNOWN, _NEUTRAL)
  options = openai_fields.stream_options(body, "include_usage")
  count = fields.number(body, "n", int, 1, openai_fields.MOST_CHOICES) or 1
  if body.get("best_of", count) != count:
    raise fields.bad("best_of", "only the value of n is supported")
  seed = fields.number(body, "seed", int, 0, 2**63 - 1)
  logprobs = fields.number(body, "logprobs", int, 0, _MOST_LOGPROBS)
  turn = generation.Turn(
    max_tokens=fields.number(body, "max_tokens", int, 1, None) or _MAX_TOKENS,
    temperature=fields.number(body, "temperature", float, 0, 2),
    top_p=fields.number(body, "top_p", float, 0, 1),
    stop=openai_fields.stop(body),
    top_logprobs=logprobs or 0,
    **openai_fields.shaping(body),
  )
  return CompletionRequest(
    model=fields.field(body, "model", str),
    turns=tuple(
      dataclasses.replace(
        turn,
        prompt=prompt,
        # A seed names the first choice; the others' follow it.
        seed=None if seed is None else seed + n,
      )
      for prompt in _prompts(body.get("prompt"))
      for n in range(count)
    ),
    count=count,
    stream=fields.field(body, "stream", bool, False),
    include_usage=options["include_usage"],
    logprobs=logprobs is not None,
    return_token_ids=fields.field(body, "return_token_ids", bool, False),
  )


class CompletionStream:
  """Writes the server-sent events of one streamed completion."""

  def __init__(
    self,
    request: CompletionRequest,
    choices: Sequence[generation.Generation],
    renderer: render.Renderer,
  ):
    self._request = request
    self._choices = choices
    self._logprobs = [_Logprobs(renderer) for _ in choices]
    self._begun: set[int] = set()  # choices of which something was sent

  def delta(self, choice: int, delta: generation.Delta) -> str:
    """The event of new tokens; empty if there is nothing to send."""
    extra: dict[str, Any] = {}
    if self._request.logprobs and delta.token_ids:
      extra["logprobs"] = self._logprobs[choice].of(delta)
    if self._request.return_token_ids and delta.token_ids:
      extra["token_ids"] = list(delta.token_ids)
      if choice not in self._begun:
        extra["prompt_token_ids"] = self._choices[
          choice
        ].plan.prompt_ids.tolist()
    if not (delta.content or extra):
      return ""
    self._begun.add(choice)
    return self._choice(choice, delta.content, None, **extra)

  def end(self) -> str:
    """The events that finish the stream."""
    events = [
      self._choice(n, "", _FINISH[choice.stop_reason])
      for n, choice in enumerate(self._choices)
    ]
    if self._request.include_usage:
      usage = self._request.usage(self._choices)
      events.append(self._event(choices=[], usage=usage))
    return "".join(events) + "data: [DONE]\n\n"

  def fail(self, failure: BaseException) -> str:
    """The event of a failure of a stream that has begun."""
    return openai_errors.error_event(failure)

  def _choice(
    self, number: int, text: str, finish: str | None, **extra: Any
  ) -> str:
    value = {"index": number, "text": text, "finish_reason": finish}
    return self._event(choices=[{**value, "logprobs": None, **extra}])

  def _event(self, **fields: Any) -> str:
    # Not by the SDK's type: it has no null for a reply that is not finished.
    value = {**self._request.head(self._choices), **fields}
    return f"data: {json.dumps(value)}\n\n"


class _Logprobs:
  """The log-probabilities of one reply, piece by piece."""

  def __init__(self, renderer: render.Renderer):
    self._renderer = renderer
    self._detokenizer = stream.Detokenizer(renderer)
    self._offset = 0  # characters before the next token

  def of(
    self, said: generation.Generation | generation.Delta
  ) -> dict[str, Any]:
    """Those of the next tokens, in nats."""
    offsets = []
    for token in said.token_ids:
      offsets.append(self._offset)
      self._offset += len(self._detokenizer.feed((token,)))
    decode = self._renderer.decode
    return {
      "tokens": [decode((token,)) for token in said.token_ids],
      "token_logprobs": list(said.logprobs),
      "top_logprobs": [
        # Backwards, so that the likeliest of the same text stays.
        {decode((token,)): logprob for token, logprob in top[::-1]}
        for top in said.top_logprobs
      ]
      or None,
      "text_offset": offsets,
    }


def _prompts(value: Any) -> list[raw_prompts.Prompt]:
  """One prompt or several, each a text or token ids."""
  if isinstance(value, str) or _is_ids(value):
    value = [value]
  if not isinstance(value, list) or not 0 < len(value) <= _MOST_PROMPTS:
    raise fields.bad(
      "prompt",
      "must be a string, a list of token ids, or a list of at most "
      f"{_MOST_PROMPTS} of either",
    )
  prompts = []
  for n, prompt in enumerate(value):
    if not prompt or not (isinstance(prompt, str) or _is_ids(prompt)):
      raise fields.bad(
        f"prompt[{n}]", "must be a non-empty string or list of token ids"
      )
    prompts.append(prompt if isinstance(prompt, str) else tuple(prompt))
  return prompts


def _is_ids(value: Any) -> bool:
  return (
    isinstance(value, list)
    and bool(value)
    and all(type(i) is int and 0 <= i < 2**31 for i in value)
  )
