"""What a request demands of its reply's form, and the grammar that says so.

A grammar is text for the engine (`engine.api.SamplingParams.grammar`): the
reply's tokens after the template's opening, up to the stop token. A model that
reasons does so first and freely; then comes what was demanded:

  a schema          the content is JSON of that schema
  a call            one tool call or more, in the syntax of the model's family
  neither           any content, then calls or none: the calls are constrained

so that the model's own parser (`render.Renderer.parse`) reads it back.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from forge_jax import errors, types
from forge_jax.gateway import call_syntax, lark, refusal, render

_PLACE = re.compile(r"^(?:at )?(\d+)\(\d+\): ")  # of an error in a grammar
_EXCERPT = re.compile(r"\n +\d+ \| ")  # of the grammar, after the error


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
  """The demands of one request; the defaults demand nothing."""

  schema: Mapping[str, Any] | None = None  # JSON schema of the content
  schema_param: str = "response_format"  # how the client calls the schema
  must_call: bool = False  # at least one tool
  only: frozenset[str] | None = None  # the tools that may be called; None: all
  # Tool -> JSON schema that its arguments follow to the letter.
  strict: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  # Tool -> argument -> grammar in Lark, for families that write texts bare.
  lark: Mapping[str, Mapping[str, str]] = dataclasses.field(
    default_factory=dict
  )
  once: bool = False  # at most one call, if anything else is demanded
  choice_param: str = "tool_choice"  # how the client calls its choice of tools

  @property
  def of_calls(self) -> bool:
    """Whether anything is demanded of tool calls."""
    return self.must_call or self.only is not None or bool(self.strict)


FREE = Constraint()


@dataclasses.dataclass(frozen=True, slots=True)
class Grammar:
  """A grammar and, by line, what of the request is to blame for it."""

  text: str
  blame: Mapping[int, tuple[str, str]]  # (parameter, what it is)
  param: str  # to blame for any other line

  def refuse(self, error: errors.GrammarError) -> refusal.Refusal:
    """The refusal of a request whose grammar the engine does not take."""
    message, param, what = str(error), self.param, "the constraint"
    if place := _PLACE.match(message):
      param, what = self.blame.get(int(place[1]), (param, what))
      message = _EXCERPT.split(message[place.end() :])[0].strip()
    return refusal.Refusal(f"{param}: {what}: {message}", param=param)


def check(
  wanted: Constraint, renderer: render.Renderer, tools: types.Messages
) -> None:
  """Refuses what no grammar can be written for.

  Raises:
    Refusal: the model's family is not known to write content or calls so that
      they can be constrained, or a tool that is chosen is not there.
  """
  names = {tool["function"]["name"] for tool in tools}
  for name in sorted(wanted.only or ()):
    if name not in names:
      raise refusal.Refusal(
        f"{wanted.choice_param}: there is no tool {name!r}",
        param=wanted.choice_param,
      )
  if wanted.must_call and not tools:
    raise refusal.Refusal(
      f"{wanted.choice_param}: a call is demanded, but there are no tools",
      param=wanted.choice_param,
    )
  if wanted.of_calls or (wanted.schema is not None and tools):
    syntax = renderer.call_syntax
    if syntax is None:
      raise _unknown(_param(wanted), "tool calls", renderer)
    if wanted.schema is not None and not (wanted.must_call or syntax.marks):
      raise _unknown(wanted.schema_param, "content beside tools", renderer)
  marked = renderer.call_syntax is not None and renderer.call_syntax.lead
  if wanted.schema is not None and not (marked or renderer.content_is_plain):
    raise _unknown(wanted.schema_param, "content", renderer)


def grammar(
  wanted: Constraint,
  renderer: render.Renderer,
  prompt_ids: Sequence[int],
  tools: types.Messages,
) -> Grammar | None:
  """The grammar of a reply; None if nothing is demanded.

  Args:
    wanted: what has passed `check`.
    renderer: of the model.
    prompt_ids: of the request: they tell whether the reply begins in reasoning.
    tools: that may be called.
  """
  syntax = renderer.call_syntax
  bare = syntax is not None and bool(syntax.pair)
  if not (
    wanted.of_calls or wanted.schema is not None or (wanted.lark and bare)
  ):
    return None
  lead = syntax is not None and bool(syntax.lead)
  marks = syntax.marks if syntax is not None and (tools or lead) else ()
  writer = lark.Writer({mark: renderer.special[mark] for mark in marks})
  options = []
  if wanted.schema is not None and not wanted.must_call:
    blame = (wanted.schema_param, "the schema")
    content = writer.json(wanted.schema, blame)
    options.append(syntax.said(writer, content) if syntax else content)
  if callable := [
    _with_grammars(tool, wanted.lark) if bare else tool
    for tool in tools
    if wanted.only is None or tool["function"]["name"] in wanted.only
  ]:
    free = not wanted.must_call and wanted.schema is None
    if free:
      options.append(syntax.said(writer, f"{syntax.text}?"))
    after_text = free and bool(syntax.marks)
    options.append(
      syntax.calls(
        writer,
        callable,
        wanted.strict,
        wanted.once,
        after_text=after_text,
      )
    )
  reply = writer.rule(" | ".join(options))
  if lead:
    reasoning = syntax.begun(writer)
  else:
    reasoning = _reasoning(writer, renderer, prompt_ids, marks[:1])
  return Grammar(
    writer.text(f"{reasoning} {reply}"), writer.blame, _param(wanted)
  )


def _with_grammars(
  tool: types.Message, lark: Mapping[str, Mapping[str, str]]
) -> types.Message:
  """A tool whose parameters hold the grammars of its arguments."""
  function = tool["function"]
  if function["name"] not in lark:
    return tool
  properties = {
    argument: {"type": "string", call_syntax.LARK: text}
    for argument, text in lark[function["name"]].items()
  }
  parameters = {**function["parameters"], "properties": properties}
  return {**tool, "function": {**function, "parameters": parameters}}


def _reasoning(
  writer: lark.Writer,
  renderer: render.Renderer,
  prompt_ids: Sequence[int],
  marks: Sequence[str],
) -> str:
  """What comes before the demand: the reasoning, as long as the model likes.

  It does not hold `marks`: parsers take the opening of a call for its end.
  """
  close, opening = renderer.think_close_id, renderer.think_open_id
  if close is None:
    return ""
  other = [close, *(renderer.special[mark] for mark in marks)]
  rest = f"<[^{','.join(map(str, other))}]>* <[{close}]> /[ \\n]{{0,4}}/?"
  if renderer.opens_reasoning(prompt_ids):
    return writer.rule(rest)
  if opening is None or renderer.closes_reasoning(prompt_ids):
    return ""
  return writer.rule(f"<[{opening}]> {rest}") + "?"


def _param(wanted: Constraint) -> str:
  """The parameter to blame for the whole grammar."""
  if wanted.must_call or wanted.only is not None:
    return wanted.choice_param
  return wanted.schema_param if wanted.schema is not None else "tools"


def _unknown(
  param: str, what: str, renderer: render.Renderer
) -> refusal.Refusal:
  return refusal.Refusal(
    f"{param}: how models of the family {renderer.name!r} write {what} is not "
    "known well enough to constrain it",
    param=param,
  )
