"""OpenAI Responses: requests in; responses, stored or not, and streams out.

Everything a request holds is honoured or refused by name. Its instructions are
the first message, a system message; role `developer` becomes `system`. What
becomes of items and of tools is told in `openai_responses_input` and
`openai_responses_tools`.

State: a session stores the responses whose `store` is not false; a request that
names one as the previous response goes on from the items of its whole chain.
Instructions are of one request only, and are not inherited.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import time
import typing
from typing import Any

from openai.types import responses

from forge_jax.gateway import generation, render, sessions, stored
from forge_jax.gateway.dialects import (
  fields,
  openai_demands,
  openai_errors,
  openai_fields,
  openai_logprobs,
  openai_responses_input,
  openai_responses_output,
  openai_responses_stream,
  openai_responses_tools,
)

PATH = "/responses"
error = functools.partial(openai_errors.error, prompt="input")

# Accounting, or a limit to tools that are never run here: they change nothing
# about what is sampled. The verbosity of `text` is ignored too.
_IGNORED = frozenset(
  {
    "client_metadata",
    "max_tool_calls",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
  }
)
# Not supported, but for the value that asks for nothing.
_NEUTRAL: Mapping[str, Any] = {
  "background": False,
  "truncation": "disabled",
}
_KNOWN = _IGNORED | {
  "include",
  "input",
  "instructions",
  "max_output_tokens",
  "model",
  "parallel_tool_calls",
  "previous_response_id",
  "reasoning",
  "return_token_ids",
  "store",
  "stream",
  "stream_options",
  "temperature",
  "text",
  "tool_choice",
  "tools",
  "top_logprobs",
  "top_p",
}
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = typing.get_args(responses.ResponseIncludable)
_SUMMARIES = ("auto", "concise", "detailed")
_ECHOED = (
  "max_output_tokens",
  "max_tool_calls",
  "previous_response_id",
  "prompt_cache_key",
  "safety_identifier",
  "user",
)


@dataclasses.dataclass(frozen=True, slots=True)
class ResponsesRequest:
  """A request: what to sample, and what to say and to keep of it."""

  turns: tuple[generation.Turn, ...]
  stream: bool
  store: bool
  form: openai_responses_output.Form
  items: tuple[stored.Item, ...]  # its own input
  previous: stored.StoredResponse | None
  ledger: stored.Stored
  echo: Mapping[str, Any]  # the fields of a response that repeat the request
  created: int  # seconds since 1970
  return_token_ids: bool

  def reply(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> str:
    """The JSON of a finished response; stores it."""
    return responses.Response.model_validate(
      self._finish(choices[0], renderer)
    ).model_dump_json(exclude_unset=True, by_alias=True)

  def events(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> openai_responses_stream.ResponseStream:
    """The writer of a streamed response."""
    return openai_responses_stream.ResponseStream(
      choices[0],
      self.form,
      renderer,
      lambda status: self._response(choices[0], status),
      lambda: self._finish(choices[0], renderer),
    )

  def _response(
    self, generated: generation.Generation, status: str
  ) -> dict[str, Any]:
    key = openai_responses_output.response_key(generated.plan.request_id)
    return {
      "id": f"resp_{key}",
      "object": "response",
      "created_at": self.created,
      "status": status,
      "error": None,
      "incomplete_details": None,
      "output": [],
      "usage": None,
      "store": self.store,
      **self.echo,
    }

  def _finish(
    self, generated: generation.Generation, renderer: render.Renderer
  ) -> dict[str, Any]:
    cut = openai_responses_output.is_cut(generated)
    response = self._response(generated, "incomplete" if cut else "completed")
    if cut:
      response["incomplete_details"] = {"reason": "max_output_tokens"}
    else:
      response["completed_at"] = int(time.time())
    output = openai_responses_output.items(
      generated, self.form, renderer, self.ledger
    )
    response["output"] = output
    if self.return_token_ids:
      response["prompt_token_ids"] = generated.plan.prompt_ids.tolist()
      response["token_ids"] = generated.token_ids
    response["usage"] = openai_responses_output.usage(generated, renderer)
    if self.store:
      key = openai_responses_output.response_key(generated.plan.request_id)
      items = stored.with_ids(self.items, f"item_{key}")
      self.ledger.add(
        stored.StoredResponse(
          response["id"], response, items, tuple(output), self.previous
        )
      )
    return response


def parse(body: Any, session: sessions.Session) -> ResponsesRequest:
  """Reads a request's JSON.

  Raises:
    Refusal: something is missing, malformed, not stored or not supported; it
      names the parameter.
  """
  body = _checked(body)
  model = fields.field(body, "model", str)
  ledger = session.stored
  tools = openai_responses_tools.read(body)
  effort, summary = _reasoning(fields.field(body, "reasoning", dict, {}))
  text = _text(fields.field(body, "text", dict, {}))
  parallel = fields.field(body, "parallel_tool_calls", bool, True)
  top_logprobs = openai_logprobs.count(body)
  include = _include(fields.field(body, "include", list, []))
  openai_fields.stream_options(body)
  previous, items, messages = _conversation(body, ledger)
  turn = generation.Turn(
    messages=messages,
    tools=tools.functions,
    max_tokens=fields.number(body, "max_output_tokens", int, 1, None),
    temperature=fields.number(body, "temperature", float, 0, 2),
    top_p=fields.number(body, "top_p", float, 0, 1),
    parallel_tool_calls=parallel,
    reasoning_effort=effort,
    top_logprobs=top_logprobs if _LOGPROBS in include else 0,
    constraint=openai_demands.demands(
      tools.chosen,
      openai_demands.schema(text["format"], "text.format", nested=False),
      "text.format",
      parallel=parallel,
      strict=tools.strict,
      lark=tools.lark,
    ),
  )
  return ResponsesRequest(
    turns=(turn,),
    stream=fields.field(body, "stream", bool, False),
    store=fields.field(body, "store", bool, True),
    form=openai_responses_output.Form(
      tools=tools,
      summary=summary is not None,
      sealed="reasoning.encrypted_content" in include,
      logprobs=_LOGPROBS in include,
    ),
    items=tuple(items),
    previous=previous,
    ledger=ledger,
    echo={
      **{k: v for k, v in body.items() if k in _ECHOED},
      "background": False,
      "instructions": body.get("instructions"),
      "metadata": fields.field(body, "metadata", dict, {}),
      "model": model,
      "parallel_tool_calls": turn.parallel_tool_calls,
      "reasoning": {"effort": effort, "summary": summary},
      "service_tier": "default",
      "temperature": _effective(turn.temperature, "temperature", session),
      "text": text,
      "tool_choice": body.get("tool_choice", "auto"),
      "tools": list(tools.declared),
      "top_logprobs": top_logprobs,
      "top_p": _effective(turn.top_p, "top_p", session),
      "truncation": "disabled",
    },
    created=int(time.time()),
    return_token_ids=fields.field(body, "return_token_ids", bool, False),
  )


def count(
  body: Any, session: sessions.Session, renderer: render.Renderer
) -> int:
  """Tokens of the prompt that a request's conversation renders to.

  Raises:
    Refusal: as `parse` does; a model is not needed.
  """
  body = _checked(body)
  tools = openai_responses_tools.read(body)
  effort, _ = _reasoning(fields.field(body, "reasoning", dict, {}))
  _text(fields.field(body, "text", dict, {}))
  _, _, messages = _conversation(body, session.stored)
  renderer = renderer.with_effort(effort)
  return len(renderer.render(messages, tools.functions).ids)


def _checked(body: Any) -> dict[str, Any]:
  """The parameters that are not null, all of them known."""
  body = openai_fields.checked(body, _KNOWN, _NEUTRAL)
  for name in ("user", "prompt_cache_key", "safety_identifier"):
    fields.field(body, name, str, "")
  fields.number(body, "max_tool_calls", int, 0, None)
  for name, value in fields.field(body, "metadata", dict, {}).items():
    if not isinstance(value, str):
      raise fields.bad(f"metadata.{name}", "must be a JSON string")
  return body


def _conversation(
  body: dict[str, Any], ledger: stored.Stored
) -> tuple[
  stored.StoredResponse | None, list[stored.Item], list[dict[str, Any]]
]:
  """The previous response, the request's own items, all of its messages."""
  previous = None
  if id := fields.field(body, "previous_response_id", str, ""):
    previous = ledger.previous(id)
  items = openai_responses_input.read(body.get("input"), ledger)
  context = [*previous.context(), *previous.output] if previous else []
  messages = openai_responses_input.messages([*context, *items], ledger)
  if instructions := fields.field(body, "instructions", str, ""):
    messages.insert(0, {"role": "system", "content": instructions})
  if not messages:
    raise fields.bad("input", "is required")
  return previous, items, messages


def _reasoning(options: dict[str, Any]) -> tuple[str | None, str | None]:
  """The effort and the kind of summary that are asked for."""
  known = {
    "summary": _SUMMARIES,
    "generate_summary": _SUMMARIES,
    "context": ("auto",),
    "mode": ("standard",),
  }
  for name, value in options.items():
    if name == "effort":
      openai_fields.effort(value, "reasoning.effort")
    elif name not in known:
      raise fields.bad(f"reasoning.{name}", "this parameter is not supported")
    elif value is not None and value not in known[name]:
      raise fields.bad(
        f"reasoning.{name}",
        f"must be one of {[*known[name]]}, not {value!r:.40}",
      )
  summary = options.get("summary") or options.get("generate_summary")
  return options.get("effort"), summary


def _text(options: dict[str, Any]) -> dict[str, Any]:
  """What a response repeats of the text options."""
  text: dict[str, Any] = {"format": {"type": "text"}}
  for name, value in options.items():
    if name == "format":
      if openai_demands.schema(value, "text.format", nested=False) is not None:
        text["format"] = value
    elif name != "verbosity":
      raise fields.bad(f"text.{name}", "this parameter is not supported")
    elif value not in (None, "low", "medium", "high"):
      raise fields.bad("text.verbosity", "must be 'low', 'medium' or 'high'")
    else:
      text["verbosity"] = value
  return text


def _include(names: list[Any]) -> list[str]:
  """What is to be included; what belongs to tools of OpenAI's is never there."""
  for name in names:
    if name not in _INCLUDABLE:
      raise fields.bad("include", f"must be of {[*_INCLUDABLE]}, not {name!r}")
  return names


def _effective(
  asked: float | None, name: str, session: sessions.Session
) -> float:
  return session.sampling.get(name, 1.0) if asked is None else asked
