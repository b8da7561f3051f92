"""The tools of a Responses request: one list of functions for the model.

  function    as it is; with `strict`, calls follow its parameters
  custom      a function of one string, see `openai_custom`
  namespace   each of its tools, named `<namespace>.<tool>`, its description
              headed by the namespace's
  web_search, image_generation
              ignored: Codex declares them in every request. The reply's `tools`
              do not list them

All else is executed by OpenAI's servers and is refused. `defer_loading` and
`allowed_callers` change nothing: every tool is shown to the model and called by
it alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from openai.types import responses
import pydantic

from forge_jax.gateway import stored
from forge_jax.gateway.dialects import fields, openai_custom, openai_demands

_IGNORED = ("web_search", "image_generation")
_MODELS = {
  "function": responses.FunctionTool,
  "custom": responses.CustomTool,
  "namespace": responses.NamespaceTool,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
  """How the client knows a tool."""

  kind: str  # "function" or "custom"
  name: str
  namespace: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Tools:
  """A request's tools, as the client and as the model know them."""

  declared: tuple[Mapping[str, Any], ...] = ()  # as the client sent them
  functions: tuple[Mapping[str, Any], ...] = ()  # what is rendered
  by_name: Mapping[str, Tool] = dataclasses.field(default_factory=dict)
  chosen: openai_demands.Choice = openai_demands.ANY
  strict: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  lark: Mapping[str, Mapping[str, str]] = dataclasses.field(
    default_factory=dict
  )  # name -> argument -> grammar of its text

  def item(
    self, call: Mapping[str, Any], id: str, ledger: stored.Stored
  ) -> dict[str, Any]:
    """The item of a call that the model made.

    Args:
      call: a tool call of an internal message.
      id: of the item, without what tells its kind.
      ledger: remembers what the item does not hold.
    """
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    tool = self.by_name.get(name, Tool("function", name))
    item = {"call_id": call["id"], "name": tool.name}
    if tool.namespace is not None:
      item["namespace"] = tool.namespace
    if tool.kind == "function":
      return {
        "type": "function_call",
        "id": f"fc_{id}",
        "status": "completed",
        **item,
        "arguments": arguments,
      }
    return {
      "type": "custom_tool_call",
      "id": f"ctc_{id}",
      "status": "completed",
      **item,
      "input": openai_custom.sent(call["id"], arguments, ledger),
    }


def read(body: Mapping[str, Any]) -> Tools:
  """Reads the tools and the tool choice of a request.

  Raises:
    Refusal: a tool is malformed or not supported, or has another's name.
  """
  chosen = openai_demands.choice(body, nested=False)
  declared, functions, by_name, strict, lark = [], [], {}, {}, {}
  for n, value in enumerate(fields.field(body, "tools", list, [])):
    where = f"tools[{n}]"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in _IGNORED:
      continue
    tool = _checked(value, kind, where)
    declared.append(tool)
    for member, namespace in _members(tool, where):
      name = member["name"]
      if namespace is not None:
        name = f"{namespace['name']}.{name}"
      if name in by_name:
        raise fields.bad(where, f"there is another tool {name!r}")
      by_name[name] = Tool(
        member["type"], member["name"], namespace and namespace["name"]
      )
      functions.append(_function(name, member, namespace))
      if (schema := _strict(member)) is not None:
        strict[name] = schema
      if member["type"] == "custom":
        lark[name] = openai_custom.lark(member.get("format") or {})
  if not chosen.shown:
    return Tools(tuple(declared))
  if chosen.only is not None:
    chosen = dataclasses.replace(chosen, only=_known_as(chosen.only, by_name))
  return Tools(tuple(declared), tuple(functions), by_name, chosen, strict, lark)


def call(item: Mapping[str, Any], ledger: stored.Stored) -> dict[str, Any]:
  """The tool call, as of an internal message, that an item of a call says."""
  name = item["name"]
  if item.get("namespace"):
    name = f"{item['namespace']}.{name}"
  if item["type"] == "function_call":
    arguments = item["arguments"]
  else:
    arguments = openai_custom.written(item["call_id"], item["input"], ledger)
  return {
    "id": item["call_id"],
    "type": "function",
    "function": {"name": name, "arguments": arguments},
  }


def _checked(value: Any, kind: Any, where: str) -> dict[str, Any]:
  """A tool that the protocol's own types accept."""
  if not isinstance(kind, str) or kind not in _MODELS:
    raise fields.bad(
      where, f"tools of type {kind!r} are not supported, only {[*_MODELS]}"
    )
  if kind == "namespace":
    value = {"description": "", **value}
  try:
    _MODELS[kind].model_validate(value)
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    raise fields.bad(f"{where}.{first['loc'][0]}", first["msg"]) from error
  return value


def _members(
  tool: dict[str, Any], where: str
) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
  """The tools that a tool stands for, each with its namespace, if any."""
  if tool["type"] != "namespace":
    return [(tool, None)]
  return [
    (_checked(member, member.get("type"), f"{where}.tools[{n}]"), tool)
    for n, member in enumerate(tool["tools"])
  ]


def _function(
  name: str, tool: dict[str, Any], namespace: dict[str, Any] | None
) -> dict[str, Any]:
  """A tool as a function of the Chat Completions protocol."""
  texts = [namespace["description"] if namespace else ""]
  texts.append(tool.get("description") or "")
  description = "\n\n".join(filter(None, texts))
  if tool["type"] == "custom":
    return openai_custom.function(name, description, tool.get("format") or {})
  parameters = tool.get("parameters") or {"type": "object", "properties": {}}
  function = {"name": name}
  if description:
    function["description"] = description
  return {
    "type": "function",
    "function": {**function, "parameters": parameters},
  }


def _known_as(
  names: Sequence[str], by_name: Mapping[str, Tool]
) -> tuple[str, ...]:
  """What the model calls tools that the client calls by these names."""
  known = []
  for name in names:
    same = [model for model, tool in by_name.items() if tool.name == name]
    known += same or [name]
  return tuple(known)


def _strict(tool: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """The schema that calls of a tool must follow, if there is one."""
  if tool["type"] == "function":
    return (tool.get("parameters") or {}) if tool.get("strict") else None
  return openai_custom.strict(tool.get("format") or {})
