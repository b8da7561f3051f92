"""Ways in which a model may be asked to write tool calls as text.

In each the tools are described in the prompt, calls are read out of the reply's
text, and results are shown as text. Reading never fails: what begins like a
call and is none becomes a call whose arguments are what was written, for whoever
has the tool to refuse.

  json    a fenced block "tool" with an object: its tool and its arguments
  xml     <call tool="..."><arg name="...">...</arg></call>, values as they are
  python  a fenced block "python" with calls, all arguments by name
  action  Action: and Action Input: lines (as in ReAct, arXiv 2210.03629)
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import re
from typing import Any

from forge_jax import types

_FENCE = re.compile(r"^```tool\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"^```python\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_XML = re.compile(r'<call tool="([^"]*)">(.*?)(?:</call>|\Z)', re.DOTALL)
_ARGUMENT = re.compile(r'<arg name="([^"]*)">(.*?)</arg>', re.DOTALL)
_ACTION = re.compile(
  r"^Action:[ \t]*([^\n]*?)[ \t]*(?:\n|\Z)(?:Action Input:)?(.*?)"
  r"(?=^(?:Action|Observation|Thought):|\Z)",
  re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
  """A call as it was read."""

  name: str
  arguments: str  # JSON, if it could be read


# The functions of the tools, as their specifications have them.
_Functions = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class CallFormat:
  """One way to write calls."""

  example: Callable[[Mapping[str, Any]], str]  # a call of a function
  rule: str  # how calls are written, in a sentence
  read: Callable[[str, _Functions], Iterator[tuple[int, int, Call]]]
  result: str  # what is shown of a result, of {name} and {content}

  def describe(self, tools: types.Messages) -> str:
    """The part of a prompt that says which tools there are, and how to call."""
    functions = [tool["function"] for tool in tools]
    lines = ["Tools:"]
    for function in functions:
      lines.append(f"- {function['name']}: {function.get('description', '')}")
      for name, schema in _properties(function).items():
        kind = schema.get("type", "any")
        lines.append(f"    {name} ({kind}) {schema.get('description', '')}")
    lines += ["", self.rule, *map(self.example, functions[:1])]
    return "\n".join(line.rstrip() for line in lines)

  def split(self, text: str, tools: types.Messages) -> tuple[str, list[Call]]:
    """A reply's text without its calls, and the calls in their order."""
    found = list(self.read(text, [tool["function"] for tool in tools]))
    rest, end = [], 0
    for start, stop, _ in found:
      rest.append(text[end:start])
      end = max(end, stop)
    return "".join([*rest, text[end:]]).strip(), [call for *_, call in found]

  def show(self, name: str, content: str) -> str:
    """A result, as the model is shown it."""
    return self.result.replace("{name}", name).replace("{content}", content)


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
  return function.get("parameters", {}).get("properties", {})


def _placeholders(function: Mapping[str, Any]) -> dict[str, str]:
  return dict.fromkeys(_properties(function), "...")


def _json_example(function: Mapping[str, Any]) -> str:
  call = {"tool": function["name"], "arguments": _placeholders(function)}
  return f"```tool\n{json.dumps(call)}\n```"


def _read_json(
  text: str, functions: _Functions
) -> Iterator[tuple[int, int, Call]]:
  del functions
  for found in _FENCE.finditer(text):
    call = Call("", found[1])
    try:
      written = json.loads(found[1])
    except ValueError:
      written = None
    if isinstance(written, dict):
      arguments = json.dumps(written.get("arguments", {}))
      call = Call(str(written.get("tool", "")), arguments)
    yield *found.span(), call


def _xml_example(function: Mapping[str, Any]) -> str:
  inner = "".join(
    f'<arg name="{name}">...</arg>' for name in _properties(function)
  )
  return f'<call tool="{function["name"]}">{inner}</call>'


def _read_xml(
  text: str, functions: _Functions
) -> Iterator[tuple[int, int, Call]]:
  for found in _XML.finditer(text):
    name, body = found.groups()
    schemas = next((_properties(f) for f in functions if f["name"] == name), {})
    values = {
      argument: _typed(value, schemas.get(argument, {}).get("type"))
      for argument, value in _ARGUMENT.findall(body)
    }
    is_whole = not _ARGUMENT.sub("", body).strip()
    is_whole &= found[0].endswith("</call>")
    yield *found.span(), Call(name, json.dumps(values) if is_whole else body)


def _typed(value: str, kind: Any) -> Any:
  """A value of which only the text is known."""
  if kind in (None, "string"):
    return value
  try:
    return json.loads(value)
  except ValueError:
    return value


def _python_example(function: Mapping[str, Any]) -> str:
  inner = ", ".join(f'{name}="..."' for name in _properties(function))
  return f"```python\n{function['name']}({inner})\n```"


def _read_python(
  text: str, functions: _Functions
) -> Iterator[tuple[int, int, Call]]:
  del functions
  for found in _CODE.finditer(text):
    try:
      calls = [_python_call(line) for line in ast.parse(found[1]).body]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
      calls = [Call("", found[1])]
    for call in calls:
      yield *found.span(), call


def _python_call(statement: ast.stmt) -> Call:
  """A statement as a call; raises ValueError if it is none."""
  match statement:
    case ast.Expr(
      ast.Call(func=ast.Name(name), args=[], keywords=keywords)
    ) if all(keyword.arg for keyword in keywords):
      values = {k.arg: ast.literal_eval(k.value) for k in keywords}
      return Call(name, json.dumps(values))
  raise ValueError("no call with arguments by name")


def _action_example(function: Mapping[str, Any]) -> str:
  arguments = json.dumps(_placeholders(function))
  return f"Action: {function['name']}\nAction Input: {arguments}"


def _read_actions(
  text: str, functions: _Functions
) -> Iterator[tuple[int, int, Call]]:
  del functions
  for found in _ACTION.finditer(text):
    yield *found.span(), Call(found[1], found[2].strip() or "{}")


FORMATS: Mapping[str, CallFormat] = {
  "json": CallFormat(
    _json_example,
    "To call a tool, write a block such as this one, one for each call:",
    _read_json,
    "Result of {name}:\n{content}",
  ),
  "xml": CallFormat(
    _xml_example,
    "Tools are called like this, as often as you need in one reply:",
    _read_xml,
    '<result tool="{name}">{content}</result>',
  ),
  "python": CallFormat(
    _python_example,
    "Call tools in a code block, one call a line, all arguments by name:",
    _read_python,
    ">>> {name}\n{content}",
  ),
  "action": CallFormat(
    _action_example,
    "To use a tool, end your reply with two lines of this form:",
    _read_actions,
    "Observation: {content}",
  ),
}
