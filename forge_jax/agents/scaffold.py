"""One agent in many scaffolds, so that the policy does not learn a single one.

From task to task the names of tools and of their arguments change, the order in
which tools are shown, the prompt around the task, and the way in which calls are
written: the model's own (`native`, its template's) or one of `call_formats`. All
is drawn from the seed and the task, so that the episodes of a group have the same
scaffold and share their prompts. The environment sees none of it.

Invariants:
  1. No two tools, and no two arguments of a tool, are shown by one name.
  2. What the model calls by a shown name reaches the environment by its own.
     What has no such name, or cannot be read, reaches it as it was written, and
     the model is told what was expected in the names that it knows.
  3. The task's own words are changed in nothing; only their place may be.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import random
import re
from typing import Any

from forge_jax import errors, types
from forge_jax.agents import base, call_formats
from forge_jax.tasks import base as tasks_base

NATIVE = "native"
# Other names that a tool or an argument may go by.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
  "bash": ("shell", "terminal", "run_command", "execute"),
  "read_file": ("view", "open_file", "cat", "show_file"),
  "write_file": ("create", "save_file", "put_file"),
  "edit_file": ("str_replace", "replace_in_file", "patch"),
  "run_tests": ("test", "check", "verify"),
  "delegate": ("ask_helper", "spawn_agent", "assign"),
  "search": ("find", "lookup", "search_corpus", "query_index"),
  "open_page": ("read_page", "visit", "browse", "fetch_page"),
  "command": ("cmd", "script", "input"),
  "path": ("file", "file_path", "filename"),
  "content": ("text", "file_text", "body"),
  "old": ("old_str", "search_text", "before"),
  "new": ("new_str", "replacement", "after"),
  "task": ("instructions", "subtask", "request"),
  "query": ("q", "words", "keywords"),
  "title": ("page", "name", "id"),
  "part": ("section", "page_number", "index"),
}
# What stands in front of the prompt; the first: nothing.
_PREAMBLES = (
  "",
  "You are an agent that works with tools until the task is done.",
  "You have tools. Take one step at a time, and look at what each gives you.",
  "Solve the task below. Use tools where they help.",
  "# Agent\nPlan, act with a tool, read the result, repeat.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class ScaffoldConfig:
  """What changes from task to task."""

  seed: int = 0
  names: bool = True  # of tools and of arguments
  order: bool = True  # of tools
  prompts: bool = True  # a preamble, and whether there is a system turn
  formats: tuple[str, ...] = (NATIVE, *call_formats.FORMATS)

  def __post_init__(self):
    known = (NATIVE, *call_formats.FORMATS)
    if not self.formats or not set(self.formats) <= set(known):
      raise errors.ConfigError(
        f"scaffold formats are {self.formats}; expected of {', '.join(known)}"
      )


class ScaffoldAgent:
  """Plays episodes with an agent whose scaffold varies."""

  def __init__(self, agent: base.Agent, config: ScaffoldConfig | None = None):
    """Varies what `agent` shows its model.

    It stands next to the agent that asks the model: a `WorkspaceAgent`, an
    `McpAgent` or an `Orchestrator` goes around it. In formats that are text,
    results are the user's: contexts that look for a tool's (`truncate`), or
    have a tool of their own (`tool`), need `formats=("native",)`.
    """
    self._agent = agent
    self._config = config or ScaffoldConfig()

  async def run(
    self, environment: tasks_base.Environment, endpoint: base.Endpoint
  ) -> types.Messages:
    """Plays one episode; returns the transcript, as the model saw it."""
    return await self._agent.run(
      Scaffolded(environment, self._config), endpoint
    )


class Scaffolded:
  """An environment as a scaffold shows it."""

  def __init__(self, inner: tasks_base.Environment, config: ScaffoldConfig):
    """Draws the scaffold for the environment's opening."""
    self._inner = inner
    self._opening = [dict(message) for message in inner.reset()]
    draw = random.Random(f"{config.seed}: {json.dumps(self._opening)}")
    tools = list(inner.tools)
    if config.order:
      draw.shuffle(tools)
    self._aliases = _aliases(tools, draw if config.names else None)
    self._format = call_formats.FORMATS.get(draw.choice(config.formats))
    self._preamble, self._has_system = "", True
    if config.prompts:
      self._preamble = draw.choice(_PREAMBLES)
      self._has_system = draw.random() < 0.5
    self._calls = 0

  @property
  def tools(self) -> Sequence[types.Message]:
    return [] if self._format else self._shown

  @property
  def _shown(self) -> list[types.Message]:
    return [alias.specification for alias in self._aliases.values()]

  def reset(self) -> types.Messages:
    opening = [dict(message) for message in self._opening]
    parts = [self._preamble]
    if opening and opening[0]["role"] == "system":
      parts.append(opening.pop(0)["content"])
    if self._format and self._aliases:
      parts.append(self._format.describe(self._shown))
    text = "\n\n".join(part for part in parts if part)
    if not text:
      return opening
    first = opening[0] if opening else {}
    is_text = isinstance(first.get("content"), str)
    if self._has_system or first.get("role") != "user" or not is_text:
      return [{"role": "system", "content": text}, *opening]
    first = {**first, "content": f"{text}\n\n{first['content']}"}
    return [first, *opening[1:]]

  async def respond(self, reply: types.Message) -> types.Messages | None:
    if self._format is not None:
      reply = self._read(reply)
    calls = reply.get("tool_calls") or []
    own = reply
    if calls:
      own = {**reply, "tool_calls": [self._own_call(call) for call in calls]}
    observations = await base.respond(self._inner, own)
    if observations is None:
      return None
    wrong = {call["id"]: self._complaint(call["function"]) for call in calls}
    observations = [
      {**message, "content": complaint}
      if (complaint := wrong.get(message.get("tool_call_id")))
      else message
      for message in observations
    ]
    if self._format is None:
      return observations
    return self._as_text(calls, observations)

  def rewards(self):
    return self._inner.rewards()

  def _read(self, reply: types.Message) -> types.Message:
    """A reply whose calls are text, as one of which they are not."""
    text = reply.get("content") or ""
    rest, calls = self._format.split(text, self._shown)
    read = {**reply, "content": rest}
    if calls:
      read["tool_calls"] = [self._numbered(call) for call in calls]
    return read

  def _numbered(self, call: call_formats.Call) -> dict[str, Any]:
    self._calls += 1
    return {
      "id": f"call_{self._calls}",
      "type": "function",
      "function": {"name": call.name, "arguments": call.arguments},
    }

  def _own_call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    alias = self._aliases.get(function["name"])
    if alias is None:
      return call
    arguments = alias.own_arguments(function["arguments"])
    return {**call, "function": {"name": alias.own, "arguments": arguments}}

  def _complaint(self, function: Mapping[str, Any]) -> str | None:
    """What is wrong with a call, in the names that the model knows."""
    alias = self._aliases.get(function["name"])
    if alias is not None:
      return alias.complaint(function["arguments"])
    if self._format is not None and not function["name"]:
      return f"error: this is no call. {self._format.rule}"
    return None

  def _as_text(
    self, calls: Iterable[Mapping[str, Any]], observations: types.Messages
  ) -> types.Messages:
    """Observations with results as one text of the user's."""
    names = {call["id"]: call["function"]["name"] for call in calls}
    results = [
      self._format.show(names[message["tool_call_id"]], message["content"])
      for message in observations
      if message["role"] == "tool"
    ]
    shown = [m for m in observations if m["role"] != "tool"]
    if results:
      shown.insert(0, {"role": "user", "content": "\n\n".join(results)})
    return shown


@dataclasses.dataclass(frozen=True, slots=True)
class _Alias:
  """A tool by another name."""

  own: str
  arguments: Mapping[str, str]  # their own names, by those that are shown
  specification: types.Message

  def own_arguments(self, written: Any) -> Any:
    """A call's arguments by their own names; as written, if they are none."""
    given = _object(written)
    if given is None:
      return written
    return json.dumps({self.arguments.get(k, k): v for k, v in given.items()})

  def complaint(self, written: Any) -> str | None:
    """What is wrong with the names of a call's arguments; None: nothing."""
    given = _object(written)
    parameters = self.specification["function"]["parameters"]
    if "properties" not in parameters:  # whatever there is, is allowed
      return None
    missing = set(parameters.get("required", ())) - set(given or ())
    unknown = set(given or ()) - set(self.arguments)
    if given is not None and not missing and not unknown:
      return None
    expected = ", ".join(self.arguments) or "none"
    return f"error: expected the arguments {expected}"


def _object(written: Any) -> dict[str, Any] | None:
  try:
    given = json.loads(written or "{}")
  except (ValueError, TypeError):
    return None
  return given if isinstance(given, dict) else None


def _aliases(
  tools: types.Messages, draw: random.Random | None
) -> dict[str, _Alias]:
  """The tools by the names that they are shown by, in the order given."""
  own_names = [tool["function"]["name"] for tool in tools]
  names = _rename(own_names, draw)
  found = {}
  for own, tool in zip(own_names, tools, strict=True):
    function = dict(tool["function"])
    schema = dict(function.get("parameters") or {})
    properties = schema.get("properties", {})
    arguments = _rename(properties, draw)
    if properties:
      schema["properties"] = {arguments[a]: properties[a] for a in properties}
    if "required" in schema:
      schema["required"] = [arguments.get(a, a) for a in schema["required"]]
    function |= {"name": names[own], "parameters": schema}
    found[names[own]] = _Alias(
      own,
      {shown: argument for argument, shown in arguments.items()},
      {**tool, "function": function},
    )
  return found


def _rename(names: Iterable[str], draw: random.Random | None) -> dict[str, str]:
  """Other names by own ones, no two alike."""
  own = list(names)
  if draw is None:
    return {name: name for name in own}
  chosen: dict[str, str] = {}
  for name in own:
    other = draw.choice(_WRITTEN)(draw.choice((name, *_SYNONYMS.get(name, ()))))
    taken = {*chosen.values(), *own} - {name}
    chosen[name] = name if other in taken else other
  return chosen


def _camel(name: str) -> str:
  return re.sub(r"_([a-z])", lambda found: found[1].upper(), name)


# How a name may be written.
_WRITTEN = (str, str, _camel)
