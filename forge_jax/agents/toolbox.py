"""Tools whose work is done in a sandbox: what a white-box agent's calls do.

Whatever a call asks for, there is an answer: an argument that is missing, a
file that is not there and a command that fails are results to read.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any

from forge_jax import errors, types
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.tasks import base as tasks_base

# By name: what the tool does, and its arguments.
_TOOLS: Mapping[str, tuple[str, Mapping[str, str]]] = {
  "bash": (
    "Runs a command in a new shell, in the work directory. What it leaves "
    "running is ended with it.",
    {"command": "The command."},
  ),
  "read_file": ("Shows a file.", {"path": "Of the file."}),
  "write_file": (
    "Writes a file, new or over an old one.",
    {"path": "Of the file.", "content": "All of its text."},
  ),
  "edit_file": (
    "Replaces a text that a file has exactly once.",
    {
      "path": "Of the file.",
      "old": "The text, with enough around it to be unique.",
      "new": "What takes its place.",
    },
  ),
  "run_tests": ("Runs the tests.", {}),
}
# What the kinds of agents have.
TERMINAL = ("bash",)
CODE = ("read_file", "edit_file", "write_file", "run_tests")


@dataclasses.dataclass(frozen=True, slots=True)
class ToolboxConfig:
  """Which tools, and what one call may take."""

  tools: tuple[str, ...] = TERMINAL
  test_command: tuple[str, ...] = ("python3", "-m", "unittest", "-q")
  seconds: float = 30.0  # wall-clock of one call
  most_chars: int = 4000  # of a result; the middle is left out

  def __post_init__(self):
    for name in self.tools:
      if name not in _TOOLS:
        raise errors.ConfigError(
          f"toolbox has a tool {name!r}; expected of {', '.join(_TOOLS)}"
        )


class Toolbox:
  """The tools of one episode, over its sandbox."""

  def __init__(self, config: ToolboxConfig, box: sandbox_base.Sandbox):
    """Works in an open sandbox."""
    self._config = config
    self._box = box

  @property
  def tools(self) -> list[types.Message]:
    """The specifications, in the OpenAI wire format."""
    return [_specification(name) for name in self._config.tools]

  async def answer(self, reply: types.Message) -> types.Messages | None:
    """The results of a reply's calls, in order; None: it has no calls.

    Raises:
      SandboxError: the sandbox has died.
    """
    calls = reply.get("tool_calls") or []
    if not calls:
      return None
    return [
      {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": self._cut(await self._result(call["function"])),
      }
      for call in calls
    ]

  async def _result(self, function: Mapping[str, Any]) -> str:
    name = function["name"]
    if name not in self._config.tools:
      return f"error: there is no tool {name!r}"
    try:
      arguments = _read(function["arguments"], _TOOLS[name][1])
    except ValueError as error:
      return f"error: {error}"
    work: Callable[..., Awaitable[str]] = getattr(self, f"_{name}")
    return await work(**arguments)

  async def _bash(self, command: str) -> str:
    return await self._run(["sh", "-c", command])

  async def _run_tests(self) -> str:
    return await self._run(self._config.test_command)

  async def _read_file(self, path: str) -> str:
    return await self._run(["cat", "--", path])

  async def _write_file(self, path: str, content: str) -> str:
    # By a program, because a path that cannot be written is then its problem.
    script = 'mkdir -p -- "$(dirname -- "$1")" && cat >"$1"'
    command = ["sh", "-c", script, "sh", path]
    return await self._run(command, content.encode()) or "written"

  async def _edit_file(self, path: str, old: str, new: str) -> str:
    command = ["cat", "--", path]
    result = await self._box.run(command, seconds=self._config.seconds)
    if result.failure is not None or result.dropped_bytes:
      return _printed(result) or "error: the file is too large"
    text = result.stdout.decode(errors="surrogateescape")
    found = text.count(old) if old else 0
    if found != 1:
      return f"error: the text is {found} times in {path}; expected once"
    data = text.replace(old, new).encode(errors="surrogateescape")
    script = 'cat >"$1"'
    return await self._run(["sh", "-c", script, "sh", path], data) or "edited"

  async def _run(self, command: Sequence[str], stdin: bytes = b"") -> str:
    result = await self._box.run(
      command, seconds=self._config.seconds, stdin=stdin
    )
    return _printed(result)

  def _cut(self, text: str) -> str:
    half = self._config.most_chars // 2
    if len(text) <= 2 * half:
      return text
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[{left_out} characters left out]\n{text[-half:]}"


def _specification(name: str) -> types.Message:
  """A tool as the model is shown it."""
  description, arguments = _TOOLS[name]
  schemas = {
    argument: {**tasks_base.TEXT, "description": meaning}
    for argument, meaning in arguments.items()
  }
  return tasks_base.tool(name, description, schemas)


def _read(written: Any, expected: Mapping[str, str]) -> dict[str, str]:
  """A call's arguments; raises ValueError with what is wrong."""
  try:
    given = json.loads(written or "{}")
  except (ValueError, TypeError) as error:
    raise ValueError(f"the arguments are no JSON: {error}") from error
  if not isinstance(given, dict) or set(given) != set(expected):
    raise ValueError(f"expected the arguments {', '.join(expected) or 'none'}")
  for name, value in given.items():
    if not isinstance(value, str) or "\0" in value:
      raise ValueError(f"{name} must be a string without NUL")
  return given


def _printed(result: sandbox_base.Result) -> str:
  """What a command printed, and how it ended unless well."""
  text = (result.stdout + result.stderr).decode(errors="replace")
  if result.failure is None:
    return text
  return f"{text.rstrip()}\n[{result.failure}]".lstrip()
