"""How the model families write their tool calls, as grammars.

A family is here if a call that is written so is what its parser in `renderers`
reads back, with the types that the tool's schema declares. Calls are marked by
special tokens, or, in Llama 3, are all of the reply.
"""

from collections.abc import Container, Mapping
import dataclasses
import json
import re
from typing import Any

from forge_jax import types
from forge_jax.gateway import lark, refusal

LARK = "x-lark"  # keyword of a text's schema: its grammar
_NAME = re.compile(r"[\w.-]+")  # what can stand in a call unquoted
_NAMED, _ARGUMENTS, _KEY, _VALUE = "\0name", "\0arguments", "\0key", "\0value"
_TEXT = "\0text"  # any


@dataclasses.dataclass(frozen=True, slots=True)
class Syntax:
  """The calls of a family; arguments are a JSON object, or pair by pair."""

  call: str  # with the tool's name and its arguments
  pair: str = ""  # with an argument's key and value; empty: a JSON object
  text_pair: str = ""  # for a value that is a string, if it is otherwise
  opening: str = ""  # before the first call
  between: str = "\n"
  closing: str = ""  # after the last call
  quoted: bool = False  # the name is a JSON string
  only_one: bool = False
  lead: str = ""  # what a reply begins with, if it is not reasoning in tags
  content: str = _TEXT  # with its text
  text: str = lark.TEXT  # of content that is no call
  marks: tuple[str, ...] = ()  # which must be special tokens of the tokenizer
  tags: tuple[str, ...] = ()  # which may be

  def calls(
    self,
    writer: lark.Writer,
    tools: types.Messages,
    strict: Mapping[str, Mapping[str, Any]],
    once: bool,
    *,
    after_text: bool = False,
  ) -> str:
    """Adds the rules of one call or more.

    Args:
      writer: of the grammar.
      tools: that may be called; a text's schema may hold a grammar, `LARK`.
      strict: by name, schemas that must be followed to the letter; of the
        others' schemas what the engine does not know is overlooked.
      once: whether there may be no second call.
      after_text: whether content may come first.

    Raises:
      Refusal: a tool cannot be called so.
    """
    one = writer.rule(
      " | ".join(self._call(writer, tool["function"], strict) for tool in tools)
    )
    calls = one
    if not (once or self.only_one):
      calls = f"{one} ({writer.spell(self.between)} {one})*"
    opening = writer.spell(self.opening)
    if after_text and self.content == _TEXT:
      opening = writer.until(self.opening)
    elif after_text and self.opening == self.content.replace(_TEXT, ""):
      opening = self.said(writer, f"{self.text}?")
    pieces = (opening, calls, writer.spell(self.closing))
    return writer.rule(" ".join(piece for piece in pieces if piece))

  def said(self, writer: lark.Writer, text: str) -> str:
    """Content whose text is of a rule."""
    return _filled(writer, self.content, text)

  def begun(self, writer: lark.Writer) -> str:
    """Adds the rule of a reply's `lead`, as long as the model likes."""
    return writer.rule(_filled(writer, self.lead, f"{self.text}?"))

  def _call(
    self,
    writer: lark.Writer,
    function: Mapping[str, Any],
    strict: Mapping[str, Mapping[str, Any]],
  ) -> str:
    name = function["name"]
    blame = ("tools", f"the parameters of {name!r}")
    lenient = name not in strict
    parameters = strict.get(name, function.get("parameters") or {})
    if not self.quoted and not _NAME.fullmatch(name):
      raise refusal.Refusal(
        f"tools: this model's calls cannot hold the name {name!r}",
        param="tools",
      )
    schema = {"type": "object", **parameters}
    said = json.dumps(name) if self.quoted else name
    head, _, tail = self.call.replace(_NAMED, said).partition(_ARGUMENTS)
    if not self.pair:
      arguments = writer.json(schema, blame, lenient=lenient)
    else:
      arguments = self._pairs(writer, schema, blame, lenient)
    pieces = (writer.spell(head), arguments, writer.spell(tail))
    return writer.rule(" ".join(piece for piece in pieces if piece))

  def _pairs(
    self,
    writer: lark.Writer,
    schema: Mapping[str, Any],
    blame: tuple[str, str],
    lenient: bool,
  ) -> str:
    """The arguments of one call, in the order of the schema's properties."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    if not (
      isinstance(properties, dict) and isinstance(required, list | tuple)
    ):
      raise refusal.Refusal(
        f"tools: {blame[1]}: 'properties' must be an object and 'required' a "
        "list",
        param="tools",
      )
    shared = {k: v for k, v in schema.items() if k in ("$defs", "definitions")}
    pairs = []
    for key, value in properties.items():
      pair = self.text_pair if self.text_pair and _is_text(value) else self.pair
      before, _, after = pair.partition(_KEY)
      middle, _, tail = after.partition(_VALUE)
      close, end = _end(tail)
      body = " ".join(
        (
          writer.spell(before),
          lark.quote(key),
          writer.spell(middle),
          _value(writer, value, shared, close, blame, lenient),
          writer.spell(end),
        )
      )
      pairs.append(writer.rule(body) + ("" if key in required else "?"))
    return " ".join(pairs)


def _filled(writer: lark.Writer, around: str, text: str) -> str:
  """What stands around a text, and the text, as a rule's body."""
  before, _, after = around.partition(_TEXT)
  return f"{writer.spell(before)} {text} {writer.spell(after)}".strip()


def _end(tail: str) -> tuple[str, str]:
  """What closes a value, and what is left of the text after it."""
  close, bracket, rest = tail.partition(">")
  return close + bracket, rest


def _value(
  writer: lark.Writer,
  schema: Any,
  shared: Mapping[str, Any],
  close: str,
  blame: tuple[str, str],
  lenient: bool,
) -> str:
  """A value and what closes it: a bare text if it is a string, else JSON."""
  if not _is_text(schema):
    value = schema if isinstance(schema, dict) else {}
    said = writer.json({**value, **shared}, blame, lenient=lenient)
    return f"{said} {writer.spell(close)}"
  if isinstance(schema.get(LARK), str):
    return f"{writer.lark(schema[LARK], blame)} {writer.spell(close)}"
  texts = [schema["const"]] if "const" in schema else schema.get("enum")
  if isinstance(texts, list) and all(isinstance(t, str) for t in texts):
    options = writer.rule(" | ".join(map(lark.quote, texts)) or '""')
    return f"{options} {writer.spell(close)}"
  if isinstance(pattern := schema.get("pattern"), str):
    return f"{writer.rule(_regex(pattern), blame=blame)} {writer.spell(close)}"
  unknown = schema.keys() - {"type", "description", "title", "default"}
  if unknown and not lenient:
    raise refusal.Refusal(
      f"tools: {blame[1]}: this model writes a string without quotes, and "
      f"{sorted(unknown)[0]!r} cannot be enforced on it",
      param="tools",
    )
  return writer.until(close)


def _is_text(schema: Any) -> bool:
  """Whether a value is a string for sure."""
  return isinstance(schema, dict) and schema.get("type") in (
    "string",
    ["string"],
  )


def _regex(pattern: str) -> str:
  """The texts that a pattern is found in."""
  whole = pattern.removeprefix("^").removesuffix("$")
  before = "" if pattern.startswith("^") else "(?s:.*)"
  after = "" if pattern.endswith("$") else "(?s:.*)"
  whole = whole.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")
  return f"/{before}(?:{whole}){after}/"


_HERMES = Syntax(
  f'<tool_call>\n{{"name": {_NAMED}, "arguments": {_ARGUMENTS}}}\n</tool_call>',
  quoted=True,
  marks=("<tool_call>", "</tool_call>"),
)
_QWEN_XML = Syntax(
  f"<tool_call>\n<function={_NAMED}>\n{_ARGUMENTS}</function>\n</tool_call>",
  pair=f"<parameter={_KEY}>\n{_VALUE}\n</parameter>\n",
  marks=("<tool_call>", "</tool_call>"),
)
_GLM_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_GLM_4 = Syntax(
  f"<tool_call>{_NAMED}\n{_ARGUMENTS}</tool_call>",
  pair=f"<arg_key>{_KEY}</arg_key>\n<arg_value>{_VALUE}</arg_value>\n",
  marks=("<tool_call>", "</tool_call>"),
  tags=_GLM_TAGS,
)
_GLM_5 = Syntax(
  f"<tool_call>{_NAMED}{_ARGUMENTS}</tool_call>",
  pair=f"<arg_key>{_KEY}</arg_key><arg_value>{_VALUE}</arg_value>",
  between="",
  marks=("<tool_call>", "</tool_call>"),
  tags=_GLM_TAGS,
)
_HY3 = ":opensource>"  # how its tags end
_KIMI = Syntax(
  f"<|tool_call_begin|>functions.{_NAMED}:0<|tool_call_argument_begin|>"
  f"{_ARGUMENTS}<|tool_call_end|>",
  opening="<|tool_calls_section_begin|>",
  between="",
  closing="<|tool_calls_section_end|>",
  only_one=True,  # the calls of a reply are numbered
  marks=(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
  ),
)
_DEEPSEEK = Syntax(
  f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{_NAMED}\n```json\n{_ARGUMENTS}"
  "\n```<｜tool▁call▁end｜>",
  opening="<｜tool▁calls▁begin｜>",
  closing="<｜tool▁calls▁end｜>",
  marks=(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
  ),
)
_DSML_PAIR = (
  f'<｜DSML｜parameter name="{_KEY}" string="%s">{_VALUE}</｜DSML｜parameter>\n'
)
# By the name of a renderer; that of the generic one by its parser of calls.
_FAMILIES: Mapping[str, Syntax] = {
  "qwen3": _HERMES,
  "qwen3-vl": _HERMES,
  "default/qwen3": _HERMES,
  "default/qwen3.5": _QWEN_XML,
  "prime-qwen3": _QWEN_XML,
  "qwen3.5": _QWEN_XML,
  "qwen3.6": _QWEN_XML,
  "qwen3.8": _QWEN_XML,
  "nemotron-3": _QWEN_XML,
  "nemotron-3-ultra": _QWEN_XML,
  "nemotron-3.5": _QWEN_XML,
  "glm-4.5": _GLM_4,
  "glm-5": _GLM_5,
  "glm-5.1": _GLM_5,
  "glm-5.3": _GLM_5,
  "laguna-m.1": _GLM_4,
  "laguna-xs.2": _GLM_4,
  "laguna-s-2.1": _GLM_5,
  "laguna-xs-2.1": _GLM_5,
  "gpt-oss": Syntax(
    f"<|channel|>commentary to=functions.{_NAMED} <|constrain|>json<|message|>"
    f"{_ARGUMENTS}",
    only_one=True,
    lead=f"{_TEXT}<|end|><|start|>assistant",
    content=f"<|channel|>final<|message|>{_TEXT}",
    marks=(
      "<|channel|>",
      "<|constrain|>",
      "<|message|>",
      "<|end|>",
      "<|start|>",
    ),
  ),
  "hy3": Syntax(
    f"<tool_call{_HY3}{_NAMED}<tool_sep{_HY3}\n{_ARGUMENTS}</tool_call{_HY3}",
    pair=f"<arg_key{_HY3}{_KEY}</arg_key{_HY3}\n"
    f"<arg_value{_HY3}{_VALUE}</arg_value{_HY3}\n",
    opening=f"<tool_calls{_HY3}\n",
    closing=f"\n</tool_calls{_HY3}",
    marks=tuple(
      f"<{tag}{_HY3}"
      for tag in (
        *("tool_calls", "/tool_calls", "tool_call", "/tool_call", "tool_sep"),
        *("arg_key", "/arg_key", "arg_value", "/arg_value"),
      )
    ),
  ),
  "minimax-m2": Syntax(
    f'<invoke name="{_NAMED}">\n{_ARGUMENTS}</invoke>\n',
    pair=f'<parameter name="{_KEY}">{_VALUE}</parameter>\n',
    opening="<minimax:tool_call>\n",
    between="",
    closing="</minimax:tool_call>",
    marks=("<minimax:tool_call>", "</minimax:tool_call>"),
  ),
  "inkling": Syntax(
    f"<|message_model|>{_NAMED}<|content_invoke_tool_json|>"
    f'{{"name":"{_NAMED}","args":{_ARGUMENTS}}}<|end_message|>',
    opening="<|content_text|><|end_message|>",
    between="",
    lead=f"<|content_thinking|>{_TEXT}<|end_message|><|message_model|>",
    content=f"<|content_text|>{_TEXT}<|end_message|>",
    marks=(
      "<|message_model|>",
      "<|content_invoke_tool_json|>",
      "<|content_text|>",
      "<|content_thinking|>",
      "<|end_message|>",
    ),
  ),
  "kimi-k2": _KIMI,
  "kimi-k2.5": _KIMI,
  "deepseek-v3": _DEEPSEEK,
  "deepseek-r1": _DEEPSEEK,
  "deepseek-v4": Syntax(
    f'<｜DSML｜invoke name="{_NAMED}">\n{_ARGUMENTS}</｜DSML｜invoke>\n',
    pair=_DSML_PAIR % "false",
    text_pair=_DSML_PAIR % "true",
    opening="\n\n<｜DSML｜tool_calls>\n",
    between="",
    closing="</｜DSML｜tool_calls>",
    marks=("｜DSML｜",),
  ),
  "llama-3": Syntax(
    f'{{"name": {_NAMED}, "parameters": {_ARGUMENTS}}}',
    quoted=True,
    only_one=True,
    text="/[^{ \\n](?s:.*)/",
  ),
}
# Families whose content is the reply's text, after the reasoning.
_PLAIN = frozenset(
  {"default", *(f for f, syntax in _FAMILIES.items() if not syntax.lead)}
)
CHANNEL = "<|channel|>"  # of formats whose content is one of several channels


def find(
  name: str, parser: str | None, special: Container[str]
) -> Syntax | None:
  """The syntax of a model; None: it cannot be constrained.

  Args:
    name: of its renderer.
    parser: of its calls, if the renderer is the generic one.
    special: its special tokens.
  """
  syntax = _FAMILIES.get(f"default/{parser}" if name == "default" else name)
  if syntax is None or not all(mark in special for mark in syntax.marks):
    return None
  tags = tuple(tag for tag in syntax.tags if tag in special)
  return dataclasses.replace(syntax, marks=syntax.marks + tags)


def plain_content(name: str, special: Container[str]) -> bool:
  """Whether a reply's text, after the reasoning, is its content."""
  return name in _PLAIN and CHANNEL not in special
