"""OpenAI Chat Completions: requests in, completions and their streams out.

Everything a request holds is honoured or refused by name; how its messages are
read, `openai_chat_input` tells.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import time
from typing import Any

from openai.types import chat

from forge_jax import types
from forge_jax.gateway import (
  constraint,
  generation,
  render,
  sessions,
  stored,
)
from forge_jax.gateway.dialects import (
  fields,
  openai_chat_input,
  openai_chat_tools,
  openai_demands,
  openai_errors,
  openai_fields,
  openai_logprobs,
)

PATH = "/chat/completions"
error = openai_errors.error

# Accounting only: they change nothing about what is sampled.
_IGNORED = frozenset(
  {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
  }
)
# Not supported, but for the value that asks for nothing.
_NEUTRAL: Mapping[str, Any] = {"modalities": ["text"]}
_KNOWN = {
  *_IGNORED,
  *openai_fields.SHAPING,
  "logprobs",
  "max_completion_tokens",
  "max_tokens",
  "messages",
  "model",
  "n",
  "parallel_tool_calls",
  "reasoning_effort",
  "response_format",
  "return_token_ids",
  "seed",
  "stop",
  "stream",
  "stream_options",
  "temperature",
  "tool_choice",
  "tools",
  "top_logprobs",
  "top_p",
}
_FINISH = {
  types.StopReason.STOP: "stop",
  types.StopReason.LENGTH: "length",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ChatRequest:
  """A request: what to sample, and how to say it."""

  model: str
  turns: tuple[generation.Turn, ...]
  stream: bool = False
  include_usage: bool = False
  logprobs: bool = False
  return_token_ids: bool = False
  tools: openai_chat_tools.Tools = openai_chat_tools.NONE
  ledger: stored.Stored | None = None  # of what calls do not hold

  def reply(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> str:
    """The JSON of a finished completion."""
    value: dict[str, Any] = {
      "id": f"chatcmpl-{choices[0].plan.request_id}",
      "object": "chat.completion",
      "created": int(time.time()),
      "model": self.model,
      "choices": [
        self._choice(n, choice, renderer) for n, choice in enumerate(choices)
      ],
      "usage": _usage(choices),
    }
    if self.return_token_ids:
      value["prompt_token_ids"] = choices[0].plan.prompt_ids.tolist()
    return chat.ChatCompletion.model_validate(value).model_dump_json(
      exclude_unset=True
    )

  def events(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> "ChatStream":
    """The writer of a streamed completion."""
    return ChatStream(self, choices, renderer)

  def message(self, generated: generation.Generation) -> dict[str, Any]:
    """A reply as the client is sent it."""
    message = generated.message()
    if calls := message.get("tool_calls"):
      sent = [self.tools.call(call, self.ledger) for call in calls]
      message["tool_calls"] = sent
    return message

  def _choice(
    self, number: int, generated: generation.Generation, renderer
  ) -> dict[str, Any]:
    choice: dict[str, Any] = {
      "index": number,
      "finish_reason": _finish_reason(generated),
      "message": {"refusal": None, **self.message(generated)},
      "logprobs": None,
    }
    if self.logprobs:
      choice["logprobs"] = _logprobs(renderer, generated)
    if self.return_token_ids:
      choice["token_ids"] = generated.token_ids
    return choice


def parse(body: Any, session: sessions.Session | None = None) -> ChatRequest:
  """Reads a request's JSON.

  Raises:
    Refusal: something is missing, malformed or not supported; it names the
      parameter.
  """
  body = openai_fields.checked(body, _KNOWN, _NEUTRAL)
  options = openai_fields.stream_options(body, "include_usage")
  limits = ("max_completion_tokens", "max_tokens")
  max_tokens = [
    fields.number(body, k, int, 1, None) for k in limits if k in body
  ]
  count = fields.number(body, "n", int, 1, openai_fields.MOST_CHOICES) or 1
  seed = fields.number(body, "seed", int, 0, 2**63 - 1)
  chosen = openai_demands.choice(body, nested=True)
  tools = (
    openai_chat_tools.read(body) if chosen.shown else openai_chat_tools.NONE
  )
  ledger = session.stored if session else stored.Stored(lambda record: None)
  said = fields.field(body, "messages", list)
  turn = generation.Turn(
    messages=openai_chat_input.messages(said, ledger),
    tools=tools.functions,
    constraint=_constraint(body, chosen, tools),
    max_tokens=min(max_tokens, default=None),
    temperature=fields.number(body, "temperature", float, 0, 2),
    top_p=fields.number(body, "top_p", float, 0, 1),
    seed=seed,
    stop=openai_fields.stop(body),
    parallel_tool_calls=fields.field(body, "parallel_tool_calls", bool, True),
    reasoning_effort=openai_fields.effort(
      body.get("reasoning_effort"), "reasoning_effort"
    ),
    top_logprobs=openai_logprobs.count(body, needs="logprobs"),
    **openai_fields.shaping(body),
  )
  return ChatRequest(
    model=fields.field(body, "model", str),
    turns=tuple(
      # A seed names the first choice; the others' follow it.
      turn if seed is None else dataclasses.replace(turn, seed=seed + n)
      for n in range(count)
    ),
    stream=fields.field(body, "stream", bool, False),
    include_usage=options["include_usage"],
    logprobs=fields.field(body, "logprobs", bool, False),
    return_token_ids=fields.field(body, "return_token_ids", bool, False),
    tools=tools,
    ledger=ledger,
  )


class ChatStream:
  """Writes the server-sent events of one streamed completion."""

  def __init__(
    self,
    request: ChatRequest,
    choices: Sequence[generation.Generation],
    renderer: render.Renderer,
  ):
    self._request = request
    self._choices = choices
    self._renderer = renderer
    self._created = int(time.time())
    self._begun: set[int] = set()  # choices whose role has been sent

  def delta(self, choice: int, delta: generation.Delta) -> str:
    """The events of new tokens; empty if there is nothing to send."""
    said: dict[str, Any] = {}
    if delta.reasoning:
      said["reasoning_content"] = delta.reasoning
    if delta.content:
      said["content"] = delta.content
    extra = {}
    if self._request.logprobs and delta.token_ids:
      extra["logprobs"] = _logprobs(self._renderer, delta)
    if self._request.return_token_ids and delta.token_ids:
      extra["token_ids"] = list(delta.token_ids)
    if not (said or extra) and choice in self._begun:
      return ""
    return self._event(choice, said, None, extra)

  def end(self) -> str:
    """The events that finish the stream."""
    events = []
    for n, generated in enumerate(self._choices):
      calls = self._request.message(generated).get("tool_calls", ())
      events += [
        self._event(n, {"tool_calls": [{"index": i, **call}]}, None, {})
        for i, call in enumerate(calls)
      ]
      events.append(self._event(n, {}, _finish_reason(generated), {}))
    if self._request.include_usage:
      usage = {"choices": [], "usage": _usage(self._choices)}
      events.append(self._chunk(usage))
    return "".join(events) + "data: [DONE]\n\n"

  def fail(self, failure: BaseException) -> str:
    """The event of a failure of a stream that has begun."""
    return openai_errors.error_event(failure)

  def _event(
    self,
    number: int,
    delta: dict[str, Any],
    finish: str | None,
    extra: dict[str, Any],
  ) -> str:
    top = {}
    if number not in self._begun:
      delta = {"role": "assistant", "content": "", **delta}
      if self._request.return_token_ids and not self._begun:
        top["prompt_token_ids"] = self._choices[0].plan.prompt_ids.tolist()
      self._begun.add(number)
    choice = {
      "index": number,
      "delta": delta,
      "finish_reason": finish,
      **extra,
    }
    return self._chunk({"choices": [choice], **top})

  def _chunk(self, fields: dict[str, Any]) -> str:
    value = {
      "id": f"chatcmpl-{self._choices[0].plan.request_id}",
      "object": "chat.completion.chunk",
      "created": self._created,
      "model": self._request.model,
      **fields,
    }
    return f"data: {_checked(value)}\n\n"


def _checked(chunk: dict[str, Any]) -> str:
  """A chunk as JSON; of calls the client's types know functions alone."""
  for choice in chunk["choices"]:
    if any(
      c["type"] == "custom" for c in choice["delta"].get("tool_calls", ())
    ):
      return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
  checked = chat.ChatCompletionChunk.model_validate(chunk)
  return checked.model_dump_json(exclude_unset=True)


def _finish_reason(generated: generation.Generation) -> str:
  if generated.reply.tool_calls:
    return "tool_calls"
  return _FINISH[generated.stop_reason]


def _usage(choices: Sequence[generation.Generation]) -> dict[str, Any]:
  prompt = len(choices[0].plan.prompt_ids)
  sampled = sum(len(choice.token_ids) for choice in choices)
  return {
    "prompt_tokens": prompt,
    "completion_tokens": sampled,
    "total_tokens": prompt + sampled,
    "prompt_tokens_details": {"cached_tokens": choices[0].cached_tokens},
  }


def _logprobs(
  renderer: render.Renderer, said: generation.Generation | generation.Delta
) -> dict[str, Any]:
  content = openai_logprobs.of(
    renderer, said.token_ids, said.logprobs, said.top_logprobs
  )
  return {"content": content, "refusal": None}


def _constraint(
  body: dict[str, Any],
  chosen: openai_demands.Choice,
  tools: openai_chat_tools.Tools,
) -> constraint.Constraint:
  format, param = body.get("response_format"), "response_format"
  return openai_demands.demands(
    chosen,
    openai_demands.schema(format, param, nested=True),
    param,
    parallel=fields.field(body, "parallel_tool_calls", bool, True),
    strict=tools.strict,
    lark=tools.lark,
  )
