"""What a request to one of OpenAI's protocols demands of its reply's form.

Chat Completions nests what Responses has flat: `{"type": "function", "function":
{"name": ...}}` against `{"type": "function", "name": ...}`. A tool choice may be

  auto, none, required   "none" shows the model no tools
  a function or a custom tool, which is then called, once
  allowed_tools          of which one may (auto) or must (required) be called

and a format text, json_object or json_schema. A schema is followed to the
letter whether or not `strict` says so; what of it cannot be is refused.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from forge_jax.gateway import constraint
from forge_jax.gateway.dialects import fields

_MODES = ("none", "auto", "required")
_TOOLS = ("function", "custom")


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
  """Which tools a reply may and must call, by the client's names."""

  shown: bool = True  # False: the model is shown no tools
  must_call: bool = False
  only: tuple[str, ...] | None = None
  once: bool = False  # a single call


ANY = Choice()


def choice(body: Mapping[str, Any], *, nested: bool) -> Choice:
  """Reads the tool choice; `nested` as in Chat Completions.

  Raises:
    Refusal: it is malformed, or of a tool that is not run by the client.
  """
  value, where = body.get("tool_choice", "auto"), "tool_choice"
  if isinstance(value, str):
    if value not in _MODES:
      raise fields.bad(where, f"must be one of {[*_MODES]}, not {value!r:.40}")
    return Choice(shown=value != "none", must_call=value == "required")
  if not isinstance(value, dict):
    raise fields.bad(where, "must be a string or an object")
  if value.get("type") != "allowed_tools":
    only = (_name(value, where, nested),)
    return Choice(must_call=True, only=only, once=True)
  if nested:
    value = fields.field(value, "allowed_tools", dict, where=where)
    where += ".allowed_tools"
  mode = fields.one_of(value, "mode", _MODES[1:], where=where)
  tools = fields.field(value, "tools", list, where=where)
  names = tuple(
    _name(tool, f"{where}.tools[{n}]", nested) for n, tool in enumerate(tools)
  )
  if not names:
    raise fields.bad(f"{where}.tools", "must not be empty")
  return Choice(must_call=mode == "required", only=names)


def schema(value: Any, where: str, *, nested: bool) -> Any:
  """The JSON schema that a format demands; None for text.

  Args:
    value: the format, or None.
    where: what the client calls it.
    nested: as in Chat Completions.

  Raises:
    Refusal: it is malformed, or of an unknown type.
  """
  if value is None:
    return None
  kinds = ("text", "json_object", "json_schema")
  if not isinstance(value, dict):
    raise fields.bad(where, "must be a JSON object")
  kind = fields.one_of(value, "type", kinds, where=where)
  if kind == "text":
    return None
  if kind == "json_object":
    return {"type": "object"}
  if nested:
    value = fields.field(value, "json_schema", dict, where=where)
    where += ".json_schema"
  fields.field(value, "name", str, where=where)
  fields.field(value, "description", str, "", where=where)
  fields.field(value, "strict", bool, False, where=where)
  if nested and value.get("schema") is None:
    return {"type": "object"}
  return fields.field(value, "schema", dict, where=where)


def demands(
  chosen: Choice,
  schema: Mapping[str, Any] | None,
  schema_param: str,
  *,
  parallel: bool,
  strict: Mapping[str, Mapping[str, Any]],
  lark: Mapping[str, Mapping[str, str]],
) -> constraint.Constraint:
  """What is demanded in all.

  Args:
    chosen: the tool choice, by the names that the model knows.
    schema: of the content, if any.
    schema_param: what the client calls it.
    parallel: whether several calls are welcome.
    strict: by name of the tool, the schemas that arguments must follow.
    lark: by name of the tool, grammars of arguments that are texts.
  """
  return constraint.Constraint(
    schema=schema,
    schema_param=schema_param,
    must_call=chosen.must_call,
    only=None if chosen.only is None else frozenset(chosen.only),
    strict=strict,
    lark={name: of for name, of in lark.items() if of},
    once=chosen.once or not parallel,
  )


def _name(value: Any, where: str, nested: bool) -> str:
  """The name of a tool that is chosen."""
  if not isinstance(value, dict):
    raise fields.bad(where, "must be a JSON object")
  kind = fields.one_of(value, "type", _TOOLS, where=where)
  if nested:
    value, where = (
      fields.field(value, kind, dict, where=where),
      f"{where}.{kind}",
    )
  return fields.field(value, "name", str, where=where)
