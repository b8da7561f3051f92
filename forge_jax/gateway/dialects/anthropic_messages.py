"""Anthropic Messages: requests in, messages and their streams out.

Everything a request holds is honoured or refused by name; how its messages are
read, `anthropic_content` tells, how a reply is said, `anthropic_reply`.

  thinking: `disabled` asks the model not to think, where its template has such
    a choice; `enabled` and `adaptive` leave it to the model. `budget_tokens` is
    no limit of its own: `max_tokens` is. `display` is honoured.
  tools: custom ones. The input of one with `strict` follows its schema, as the
    reply does that of `output_config.format`. A tool with `defer_loading` is not in the prompt; the
    model learns of it from a tool_reference, and may call it. `input_examples`
    are shown as the `examples` of the input's schema.
  context_management: what a model has seen of its own thinking it has seen:
    clear_thinking changes nothing. No other edit is supported.
  thread: a conversation held by the server is not supported. The refusal has
    the code at which the client's tool runner goes on without one.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from forge_jax.gateway import constraint, generation, refusal, render, sessions
from forge_jax.gateway.dialects import (
  anthropic_content,
  anthropic_errors,
  anthropic_reply,
  fields,
)

PATH = "/messages"
COUNT_PATH = PATH + "/count_tokens"
error = anthropic_errors.error

# Billing, caching, speed, and what is tried when a model declines: they change
# nothing about what is sampled here.
_IGNORED = frozenset(
  {
    "anthropic_beta",
    "anthropic_version",
    "betas",
    "billing_policy",
    "cache_control",
    "diagnostics",
    "fallback_credit_token",
    "fallbacks",
    "metadata",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
  }
)
_COUNTED = _IGNORED | {
  "context_management",
  "messages",
  "model",
  "output_config",
  "output_format",  # what `output_config.format` was called in a beta
  "system",
  "thinking",
  "tool_choice",
  "tools",
}
_KNOWN = _COUNTED | {
  "max_tokens",
  "return_token_ids",  # not Anthropic's
  "stop_sequences",
  "stream",
  "temperature",
  "thread",  # refused
  "top_k",
  "top_p",
}
_TOOL = frozenset(
  {
    "allowed_callers",
    "cache_control",  # ignored
    "defer_loading",
    "description",
    "eager_input_streaming",  # ignored: how a call is cut into events
    "input_examples",
    "input_schema",
    "name",
    "strict",
    "type",
  }
)
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


@dataclasses.dataclass(frozen=True, slots=True)
class MessagesRequest:
  """A request: what to sample, and how to say it."""

  style: anthropic_reply.Style
  turns: tuple[generation.Turn, ...]  # one
  stream: bool = False

  def reply(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> str:
    """The JSON of a finished message."""
    del renderer
    return anthropic_reply.whole(choices[0], self.style)

  def events(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> anthropic_reply.MessageStream:
    """The writer of a streamed message."""
    del renderer
    return anthropic_reply.MessageStream(choices[0], self.style)


def parse(
  body: Any, session: sessions.Session | None = None
) -> MessagesRequest:
  """Reads a request's JSON.

  Raises:
    Refusal: something is missing, malformed or not supported; it names the
      parameter.
  """
  del session  # a request of this protocol holds its whole conversation
  body = fields.known(body, _KNOWN)
  if "thread" in body:
    raise refusal.Refusal(
      "thread: a request must hold its whole conversation",
      param="thread",
      code="thread_unsupported_request",
    )
  max_tokens = fields.number(body, "max_tokens", int, 1, None)
  if max_tokens is None:
    raise fields.bad("max_tokens", "is required")
  turn = dataclasses.replace(
    _turn(body),
    max_tokens=max_tokens,
    temperature=fields.number(body, "temperature", float, 0, 1),
    top_p=fields.number(body, "top_p", float, 0, 1),
    top_k=fields.number(body, "top_k", int, 0, 2**31 - 1),
    stop=_stop(body),
  )
  if turn.messages[-1]["role"] == "assistant":
    raise fields.bad(
      "messages", "the last one is the assistant's: no reply can be prefilled"
    )
  return MessagesRequest(
    style=anthropic_reply.Style(
      model=fields.field(body, "model", str),
      max_tokens=max_tokens,
      show_thinking=_display(body) != "omitted",
      return_token_ids=fields.field(body, "return_token_ids", bool, False),
    ),
    turns=(turn,),
    stream=fields.field(body, "stream", bool, False),
  )


def count_tokens(body: Any, renderer: render.Renderer) -> dict[str, int]:
  """The reply to a request for the length of a conversation's prompt.

  Counts the tokens of the conversation as rendered from its text; a prompt that
  replays what was sampled may differ by a few.

  Raises:
    Refusal: something is missing, malformed or not supported; it names the
      parameter.
  """
  body = fields.known(body, _COUNTED)
  fields.field(body, "model", str)
  turn = _turn(body)
  renderer = renderer.with_effort(turn.reasoning_effort)
  return {"input_tokens": len(renderer.render(turn.messages, turn.tools).ids)}


def _turn(body: dict[str, Any]) -> generation.Turn:
  """What a request says to the model."""
  _check_context_management(body)
  listed, hidden, strict = _tools(body)
  demanded, shown, parallel = _tool_choice(body)
  messages = anthropic_content.conversation(
    body.get("system"),
    fields.field(body, "messages", list),
    {tool["function"]["name"]: tool for tool in (*listed, *hidden)},
  )
  schema, schema_param = _schema(body)
  return generation.Turn(
    messages=messages,
    tools=listed if shown else (),
    hidden_tools=hidden if shown else (),
    parallel_tool_calls=parallel,
    reasoning_effort=_effort(body),
    constraint=dataclasses.replace(
      demanded,
      schema=schema,
      schema_param=schema_param,
      strict=strict if shown else {},
    ),
  )


def _tools(
  body: dict[str, Any],
) -> tuple[
  tuple[dict[str, Any], ...],
  tuple[dict[str, Any], ...],
  dict[str, dict[str, Any]],
]:
  """The tools of the prompt, those that wait for a tool_reference.

  And by name the schemas that calls of strict tools must follow.
  """
  listed, hidden, strict = [], [], {}
  for n, value in enumerate(fields.field(body, "tools", list, [])):
    where = f"tools[{n}]"
    if isinstance(value, dict) and value.get("type") not in (None, "custom"):
      raise fields.bad(
        f"{where}.type",
        f"only custom tools are supported, not {value['type']!r:.60}",
      )
    tool = fields.known(value, _TOOL, where=where)
    deferred = fields.field(tool, "defer_loading", bool, False, where=where)
    (hidden if deferred else listed).append(_tool(tool, where))
    if fields.field(tool, "strict", bool, False, where=where):
      strict[tool["name"]] = tool["input_schema"]
  if hidden and not listed:
    raise fields.bad("tools", "at least one must not have defer_loading")
  return tuple(listed), tuple(hidden), strict


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
  """A tool in the OpenAI format."""
  if tool.get("allowed_callers", ["direct"]) != ["direct"]:
    raise fields.bad(f"{where}.allowed_callers", "only ['direct'] is supported")
  function = {"name": fields.field(tool, "name", str, where=where)}
  if description := fields.field(tool, "description", str, "", where=where):
    function["description"] = description
  schema = fields.field(tool, "input_schema", dict, where=where)
  examples = fields.field(tool, "input_examples", list, [], where=where)
  if examples:
    schema = {**schema, "examples": examples}
  function["parameters"] = schema
  return {"type": "function", "function": function}


def _tool_choice(
  body: dict[str, Any],
) -> tuple[constraint.Constraint, bool, bool]:
  """What calls are demanded, whether tools are shown, whether many may be."""
  where = "tool_choice"
  choice = fields.field(body, where, dict, {"type": "auto"})
  kind = fields.one_of(
    choice, "type", ("auto", "none", "any", "tool"), where=where
  )
  one = fields.field(
    choice, "disable_parallel_tool_use", bool, False, where=where
  )
  only = None
  if kind == "tool":
    only = frozenset({fields.field(choice, "name", str, where=where)})
  demanded = constraint.Constraint(
    must_call=kind in ("any", "tool"), only=only, once=one or kind == "tool"
  )
  return demanded, kind != "none", not one


def _schema(body: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
  """The JSON schema that the reply must follow, and what it is called."""
  config, where = body.get("output_config"), "output_config.format"
  format = config.get("format") if isinstance(config, dict) else None
  if format is None:
    format, where = body.get("output_format"), "output_format"
  if format is None:
    return None, where
  format = fields.known(format, ("type", "schema"), where=where)
  fields.one_of(format, "type", ("json_schema",), where=where)
  return fields.field(format, "schema", dict, where=where), f"{where}.schema"


def _effort(body: dict[str, Any]) -> str | None:
  """How much the model is to think; None leaves it to the model."""
  config = fields.known(
    body.get("output_config", {}),
    ("effort", "format"),
    where="output_config",
  )
  effort = fields.one_of(
    config, "effort", _EFFORTS, None, where="output_config"
  )
  return "none" if _thinking(body)["type"] == "disabled" else effort


def _thinking(body: dict[str, Any]) -> dict[str, Any]:
  thinking = fields.known(
    body.get("thinking", {"type": "adaptive"}),
    ("type", "budget_tokens", "display"),
    where="thinking",
  )
  kinds = ("enabled", "disabled", "adaptive")
  fields.one_of(thinking, "type", kinds, where="thinking")
  return thinking


def _display(body: dict[str, Any]) -> str:
  displays = ("summarized", "omitted")  # a summary is the thinking itself
  return fields.one_of(
    _thinking(body), "display", displays, "summarized", where="thinking"
  )


def _check_context_management(body: dict[str, Any]) -> None:
  where = "context_management"
  config = fields.known(body.get(where, {}), ("edits",), where=where)
  for n, edit in enumerate(
    fields.field(config, "edits", list, [], where=where)
  ):
    kind = edit.get("type") if isinstance(edit, dict) else None
    if kind != "clear_thinking_20251015":
      raise fields.bad(f"{where}.edits[{n}]", f"{kind!r:.60} is not supported")


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
  stop = fields.field(body, "stop_sequences", list, [])
  if not all(isinstance(s, str) and s for s in stop):
    raise fields.bad("stop_sequences", "a stop sequence is a non-empty string")
  return tuple(stop)
