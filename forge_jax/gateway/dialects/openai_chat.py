"""OpenAI Chat Completions: requests in, completions and their streams out.

Everything a request holds is honoured or refused by name. Messages are brought
to one form: role `developer` becomes `system`, a list of text parts becomes
their concatenation, an absent content the empty string.
"""

from collections.abc import Mapping
import dataclasses
import json
import time
from typing import Any

from openai.types import chat

from forge_jax import errors, types
from forge_jax.gateway import generation, refusal, render
from forge_jax.gateway.dialects import fields

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
  }
)
# Not supported, but for the value that asks for nothing.
_NEUTRAL: Mapping[str, Any] = {
  "frequency_penalty": 0,
  "logit_bias": {},
  "modalities": ["text"],
  "n": 1,
  "parallel_tool_calls": True,
  "presence_penalty": 0,
  "response_format": {"type": "text"},
  "top_logprobs": 0,
}
_KNOWN = _IGNORED | {
  "logprobs",
  "max_completion_tokens",
  "max_tokens",
  "messages",
  "model",
  "return_token_ids",
  "seed",
  "stop",
  "stream",
  "stream_options",
  "temperature",
  "tool_choice",
  "tools",
  "top_p",
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FINISH = {
  types.StopReason.STOP: "stop",
  types.StopReason.LENGTH: "length",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ChatRequest:
  """A request: what to sample, and how to say it."""

  model: str
  turn: generation.Turn
  stream: bool = False
  include_usage: bool = False
  logprobs: bool = False
  return_token_ids: bool = False


def parse(body: Any) -> ChatRequest:
  """Reads a request's JSON.

  Raises:
    Refusal: something is missing, malformed or not supported; it names the
      parameter.
  """
  if not isinstance(body, dict):
    raise refusal.Refusal("the body must be a JSON object")
  body = {name: value for name, value in body.items() if value is not None}
  for name, value in body.items():
    if name in _NEUTRAL:
      if value != _NEUTRAL[name]:
        raise fields.bad(name, f"only {_NEUTRAL[name]!r} is supported")
    elif name not in _KNOWN:
      raise fields.bad(name, "this parameter is not supported")
  tools, options = _tools(body), fields.field(body, "stream_options", dict, {})
  limits = ("max_completion_tokens", "max_tokens")
  max_tokens = [
    fields.number(body, k, int, 1, None) for k in limits if k in body
  ]
  return ChatRequest(
    model=fields.field(body, "model", str),
    turn=generation.Turn(
      messages=_messages(fields.field(body, "messages", list)),
      tools=tools,
      max_tokens=min(max_tokens, default=None),
      temperature=fields.number(body, "temperature", float, 0, 2),
      top_p=fields.number(body, "top_p", float, 0, 1),
      seed=fields.number(body, "seed", int, 0, 2**63 - 1),
      stop=_stop(body.get("stop", [])),
    ),
    stream=fields.field(body, "stream", bool, False),
    include_usage=_include_usage(options),
    logprobs=fields.field(body, "logprobs", bool, False),
    return_token_ids=fields.field(body, "return_token_ids", bool, False),
  )


def completion(
  request: ChatRequest,
  generated: generation.Generation,
  renderer: render.Renderer,
) -> str:
  """The JSON of a finished completion."""
  choice: dict[str, Any] = {
    "index": 0,
    "finish_reason": _finish_reason(generated),
    "message": {"refusal": None, **generated.message()},
    "logprobs": None,
  }
  if request.logprobs:
    choice["logprobs"] = _logprobs(
      renderer, generated.token_ids, generated.logprobs
    )
  value: dict[str, Any] = {
    "id": f"chatcmpl-{generated.plan.request_id}",
    "object": "chat.completion",
    "created": int(time.time()),
    "model": request.model,
    "choices": [choice],
    "usage": _usage(generated),
  }
  if request.return_token_ids:
    value["prompt_token_ids"] = generated.plan.prompt_ids
    choice["token_ids"] = generated.token_ids
  return chat.ChatCompletion.model_validate(value).model_dump_json(
    exclude_unset=True
  )


class ChatStream:
  """Writes the server-sent events of one streamed completion."""

  def __init__(
    self,
    request: ChatRequest,
    generated: generation.Generation,
    renderer: render.Renderer,
  ):
    self._request = request
    self._generated = generated
    self._renderer = renderer
    self._created = int(time.time())
    self._first = True

  def delta(self, delta: generation.Delta) -> str:
    """The events of new tokens; empty if there is nothing to send."""
    said: dict[str, Any] = {}
    if delta.reasoning:
      said["reasoning_content"] = delta.reasoning
    if delta.content:
      said["content"] = delta.content
    extra = {}
    if self._request.logprobs and delta.token_ids:
      extra["logprobs"] = _logprobs(
        self._renderer, delta.token_ids, delta.logprobs
      )
    if self._request.return_token_ids and delta.token_ids:
      extra["token_ids"] = list(delta.token_ids)
    if not (said or extra or self._first):
      return ""
    return self._event(said, None, extra)

  def end(self) -> str:
    """The events that finish the stream."""
    calls = self._generated.message().get("tool_calls", ())
    events = [
      self._event({"tool_calls": [{"index": n, **call}]}, None, {})
      for n, call in enumerate(calls)
    ]
    events.append(self._event({}, _finish_reason(self._generated), {}))
    if self._request.include_usage:
      usage = {"choices": [], "usage": _usage(self._generated)}
      events.append(self._chunk(usage))
    return "".join(events) + "data: [DONE]\n\n"

  def _event(
    self, delta: dict[str, Any], finish: str | None, extra: dict[str, Any]
  ) -> str:
    top = {}
    if self._first:
      delta = {"role": "assistant", "content": "", **delta}
      if self._request.return_token_ids:
        top["prompt_token_ids"] = self._generated.plan.prompt_ids
      self._first = False
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **extra}
    return self._chunk({"choices": [choice], **top})

  def _chunk(self, fields: dict[str, Any]) -> str:
    value = {
      "id": f"chatcmpl-{self._generated.plan.request_id}",
      "object": "chat.completion.chunk",
      "created": self._created,
      "model": self._request.model,
      **fields,
    }
    chunk = chat.ChatCompletionChunk.model_validate(value)
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def error(failure: BaseException) -> tuple[int, dict[str, Any]]:
  """The HTTP status and the JSON of a failed request."""
  status, param, code = 500, None, None
  message = "the server failed; its log says why"
  if isinstance(failure, refusal.Refusal):
    status, param, code = failure.status, failure.param, failure.code
    message = str(failure)
  elif isinstance(failure, errors.ContextOverflowError):
    status, param, code = 400, "messages", "context_length_exceeded"
    message = str(failure)
  elif isinstance(failure, errors.ForgeError):
    message = str(failure)
  kind = {401: "authentication_error"}.get(status, "invalid_request_error")
  if status >= 500:
    kind = "server_error"
  return status, {
    "error": {"message": message, "type": kind, "param": param, "code": code}
  }


def _finish_reason(generated: generation.Generation) -> str:
  if generated.reply.tool_calls:
    return "tool_calls"
  return _FINISH[generated.stop_reason]


def _usage(generated: generation.Generation) -> dict[str, int]:
  prompt, sampled = len(generated.plan.prompt_ids), len(generated.token_ids)
  return {
    "prompt_tokens": prompt,
    "completion_tokens": sampled,
    "total_tokens": prompt + sampled,
  }


def _logprobs(
  renderer: render.Renderer, token_ids: Any, logprobs: Any
) -> dict[str, Any]:
  content = []
  for token, logprob in zip(token_ids, logprobs, strict=True):
    text = renderer.decode((token,))
    content.append(
      {
        "token": text,
        "bytes": list(text.encode()),
        "logprob": logprob,
        "top_logprobs": [],
      }
    )
  return {"content": content, "refusal": None}


def _messages(values: list[Any]) -> list[dict[str, Any]]:
  if not values:
    raise fields.bad("messages", "at least one message is required")
  return [_message(v, f"messages[{n}]") for n, v in enumerate(values)]


def _message(value: Any, where: str) -> dict[str, Any]:
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
      message["tool_calls"] = _tool_calls(value, where)
    if isinstance(value.get("reasoning_content"), str):
      message["reasoning_content"] = value["reasoning_content"]
  return message


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


def _tool_calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
  calls = []
  for n, call in enumerate(
    fields.field(message, "tool_calls", list, where=where)
  ):
    at = f"{where}.tool_calls[{n}]"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
      raise fields.bad(at, "must be a call of a function")
    calls.append(
      {
        "id": fields.field(call, "id", str, where=at),
        "type": "function",
        "function": {
          "name": fields.field(function, "name", str, where=f"{at}.function"),
          "arguments": fields.field(
            function, "arguments", str, where=f"{at}.function"
          ),
        },
      }
    )
  return calls


def _tools(body: dict[str, Any]) -> tuple[dict[str, Any], ...]:
  choice = body.get("tool_choice", "auto")
  if choice not in ("auto", "none"):
    raise fields.bad("tool_choice", "only 'auto' and 'none' are supported")
  tools = fields.field(body, "tools", list, [])
  for n, tool in enumerate(tools):
    where = f"tools[{n}]"
    if not isinstance(tool, dict) or tool.get("type") != "function":
      raise fields.bad(where, "only tools of type 'function' are supported")
    function = fields.field(tool, "function", dict, where=where)
    fields.field(function, "name", str, where=f"{where}.function")
    fields.field(function, "parameters", dict, {}, where=f"{where}.function")
  return () if choice == "none" else tuple(tools)


def _stop(value: Any) -> tuple[str, ...]:
  stop = [value] if isinstance(value, str) else value
  if not isinstance(stop, list) or len(stop) > 4:
    raise fields.bad("stop", "must be a string or a list of at most 4 strings")
  if not all(isinstance(s, str) and s for s in stop):
    raise fields.bad("stop", "a stop string is a non-empty string")
  return tuple(stop)


def _include_usage(options: dict[str, Any]) -> bool:
  for name in options:
    if name not in ("include_usage", "include_obfuscation"):
      raise fields.bad(
        f"stream_options.{name}", "this parameter is not supported"
      )
  return fields.field(
    options, "include_usage", bool, False, where="stream_options"
  )


def encode_error(failure: BaseException) -> str:
  """A failure as a server-sent event, for a stream that has begun."""
  return f"data: {json.dumps(error(failure)[1])}\n\n"
