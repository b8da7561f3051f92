"""The tools of a Chat Completions request: functions, and custom tools.

A custom tool is a function of one string for the model, see `openai_custom`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from forge_jax.gateway import stored
from forge_jax.gateway.dialects import fields, openai_custom


@dataclasses.dataclass(frozen=True, slots=True)
class Tools:
  """A request's tools."""

  functions: tuple[Mapping[str, Any], ...] = ()  # what is rendered
  custom: frozenset[str] = frozenset()  # the names of those that are none
  # Name -> schema that arguments follow to the letter.
  strict: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  lark: Mapping[str, Mapping[str, str]] = dataclasses.field(
    default_factory=dict
  )  # name -> argument -> grammar of its text

  def call(
    self, call: Mapping[str, Any], ledger: stored.Stored
  ) -> Mapping[str, Any]:
    """A call that the model made, as the client knows its tool."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name not in self.custom:
      return call
    text = openai_custom.sent(call["id"], arguments, ledger)
    custom = {"name": name, "input": text}
    return {"id": call["id"], "type": "custom", "custom": custom}


NONE = Tools()


def read(body: Mapping[str, Any]) -> Tools:
  """Reads the tools of a request.

  Raises:
    Refusal: one is malformed, or of another type.
  """
  functions, custom, strict, lark = [], set(), {}, {}
  for n, tool in enumerate(fields.field(body, "tools", list, [])):
    where = f"tools[{n}]"
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in ("function", "custom"):
      raise fields.bad(
        where, "only tools of type 'function' or 'custom' are supported"
      )
    said = fields.field(tool, kind, dict, where=where)
    where += f".{kind}"
    name = fields.field(said, "name", str, where=where)
    if kind == "function":
      parameters = fields.field(said, "parameters", dict, {}, where=where)
      schema = None
      if fields.field(said, "strict", bool, False, where=where):
        schema = parameters or {}
    else:
      description = fields.field(said, "description", str, "", where=where)
      format = _format(said, where)
      tool = openai_custom.function(name, description, format)
      schema = openai_custom.strict(format)
      lark[name] = openai_custom.lark(format)
      custom.add(name)
    functions.append(tool)
    if schema is not None:
      strict[name] = schema
  return Tools(tuple(functions), frozenset(custom), strict, lark)


def _format(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
  """The format of a custom tool's input, flat as in Responses."""
  format = fields.field(tool, "format", dict, {}, where=where)
  where += ".format"
  if not format:
    return {}
  kind = fields.one_of(format, "type", ("text", "grammar"), where=where)
  if kind == "text":
    return {}
  grammar = fields.field(format, "grammar", dict, where=where)
  where += ".grammar"
  return {
    "type": kind,
    "syntax": fields.one_of(grammar, "syntax", ("lark", "regex"), where=where),
    "definition": fields.field(grammar, "definition", str, where=where),
  }
