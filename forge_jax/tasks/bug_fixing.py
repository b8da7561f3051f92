"""Code: a small function has a bug; find and repair it by editing files.

The workspace holds the function in `solution.py`, broken by program, and tests
in `test_solution.py`. An agent edits and runs the tests. What counts is not
these: `solution.py` is called in a fresh sandbox with arguments that it never
saw, and what it returns is compared outside, where it cannot be changed.

Splits: train, heldout, whose functions do not occur in train; see `splits`.
Difficulty: 1 + level places are changed.

Rewards:
  fixed        perf +1.0  every call that the bug made fail is right (fail to
                          pass), and every other is still right (pass to pass)
  fail_to_pass perf +0.3  only the first of the two
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
import json
import random
from typing import Any

from forge_jax import errors, types
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.tasks import mutation, small_functions, splits, tool_calls

_SHOWN, _HIDDEN = 8, 24  # calls in the tests, and those that count
_HIGHEST = 4  # level: with more changes hardly a call would still be right
_SECONDS = 20.0  # for all hidden calls
_ASK = (
  "solution.py has a function with a bug, and test_solution.py its tests. "
  "Repair the function. Change solution.py only."
)
# Runs in the sandbox: calls the function and prints what each call returns.
_CALLER = """\
import json, sys
import solution
calls = json.load(sys.stdin)
out = []
for arguments in calls:
  try:
    out.append(json.dumps(getattr(solution, sys.argv[1])(*arguments)))
  except Exception as error:
    out.append(repr(error))
print(json.dumps(out))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class BugFixingConfig:
  """How broken a function is."""

  level: int = 0
  seed: int = 0  # of the train split only
  max_tokens: int = 512  # most new tokens of one completion

  def __post_init__(self):
    if not 0 <= self.level <= _HIGHEST:
      raise errors.ConfigError(
        f"bug_fixing level is {self.level}; expected 0 to {_HIGHEST}"
      )


class BugFixing:
  """The domain; see the module's docstring."""

  name = "bug_fixing"

  def __init__(self, config: BugFixingConfig, sandbox: sandbox_base.Backend):
    """Takes how hard it is, and where repaired functions are called."""
    self._config = config
    self._sandbox = sandbox
    self.max_tokens = config.max_tokens

  def at(self, level: int) -> "BugFixing":
    """The same domain with tasks of another difficulty."""
    config = dataclasses.replace(self._config, level=level)
    return BugFixing(config, self._sandbox)

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; see `_make` for its payload."""
    make = functools.partial(_make, split, 1 + self._config.level)
    return splits.draw(
      self.name, split, index, self._config.seed, make, disjoint=True
    )

  def environment(self, task: types.Task) -> "BugEnvironment":
    """A fresh environment for one episode of the task."""
    return BugEnvironment(task.payload, self._sandbox)

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What the policy "random" or "optimal" replies.

    random: one more change at any place of the function.
    """
    name = task.payload["function"]
    source = _source(small_functions.SPECIMENS[name].function)
    if policy == "random":
      rng = random.Random(task.id)
      source = mutation.mutate(task.payload["question"], 1, rng)
    arguments = {"path": "solution.py", "content": source}
    return [
      tool_calls.call(("write_file", arguments)),
      {"role": "assistant", "content": "Done."},
    ]


class BugEnvironment:
  """One broken function and what it should return."""

  tools = ()
  toolset = ("read_file", "edit_file", "write_file", "run_tests")

  def __init__(self, payload: Mapping[str, Any], sandbox: sandbox_base.Backend):
    self._payload = payload
    self._sandbox = sandbox
    self._left: bytes | None = None  # solution.py as the agent left it

  def reset(self) -> types.Messages:
    """What there is to do."""
    return [{"role": "user", "content": _ASK}]

  def respond(self, reply: types.Message) -> None:
    """There is nothing to say: the work is in files."""

  def files(self) -> Mapping[str, bytes]:
    """The broken function and the tests."""
    payload = self._payload
    tests = _tests(payload["function"], payload["shown"])
    return {
      "solution.py": payload["question"].encode(),
      "test_solution.py": tests.encode(),
    }

  def collect(self, files: Mapping[str, bytes]) -> None:
    """Takes the function as it is now."""
    self._left = files.get("solution.py")

  async def rewards(self) -> Sequence[types.Reward]:
    """Calls the function with arguments that the agent never saw.

    Raises:
      SandboxError: there is no sandbox to call it in.
    """
    if self._left is None:
      return []
    right = await self._call(self._left)
    was_right = self._payload["passes"]
    both = list(zip(right, was_right, strict=True))
    if not all(now for now, was in both if not was):
      return []
    perf = types.Component.PERF
    if not all(now for now, was in both if was):
      return [types.Reward("fail_to_pass", perf, 0.3)]
    return [types.Reward("fixed", perf, 1.0)]

  async def _call(self, source: bytes) -> list[bool]:
    """Whether each hidden call returns what it should."""
    calls = self._payload["hidden"]
    async with await self._sandbox.open() as box:
      await box.put({"solution.py": source, "caller.py": _CALLER.encode()})
      result = await box.run(
        ["python3", "caller.py", self._payload["function"]],
        seconds=_SECONDS,
        stdin=json.dumps([arguments for arguments, _ in calls]).encode(),
      )
    try:  # the program that wrote this is the agent's
      returned = json.loads(result.stdout.decode())
      matching = zip(returned, calls, strict=True)
      return [text == truth for text, (_, truth) in matching]
    except (ValueError, TypeError, RecursionError):
      return [False] * len(calls)


def _make(split: str, changes: int, rng: random.Random) -> dict[str, Any]:
  """Draws a bug that some calls show and others do not.

  The payload: `question`, the broken source; `function`, its name; `shown` and
  `hidden`, calls as [arguments, the JSON of what is right]; `passes`, which of
  the hidden calls are right in spite of the bug.
  """
  names = [n for n, s in small_functions.SPECIMENS.items() if s.split == split]
  specimen = small_functions.SPECIMENS[rng.choice(names)]
  source = _source(specimen.function)
  while True:
    broken = mutation.mutate(source, changes, rng)
    calls = [
      [list(arguments), json.dumps(specimen.function(*arguments))]
      for arguments in (
        specimen.arguments(rng) for _ in range(_SHOWN + _HIDDEN)
      )
    ]
    passes = _passes(broken, specimen.function.__name__, calls)
    shown, hidden = passes[:_SHOWN], passes[_SHOWN:]
    # The tests must show the bug, and it must not break everything.
    if not all(shown) and not all(hidden) and any(hidden):
      return {
        "question": broken,
        "function": specimen.function.__name__,
        "shown": calls[:_SHOWN],
        "hidden": calls[_SHOWN:],
        "passes": hidden,
      }


def _passes(source: str, name: str, calls: Sequence[Any]) -> list[bool]:
  """Which calls a function of ours, broken by us, answers rightly."""
  scope: dict[str, Any] = {}
  exec(compile(source, name, "exec"), scope)
  passes = []
  for arguments, truth in calls:
    try:
      passes.append(json.dumps(scope[name](*_json_copy(arguments))) == truth)
    except Exception:  # whatever a bug raises
      passes.append(False)
  return passes


def _json_copy(value: Any) -> Any:
  """A copy, as a program gets it that reads JSON."""
  return json.loads(json.dumps(value))


@functools.cache
def _source(function: Callable[..., Any]) -> str:
  return inspect.getsource(function)


def _tests(name: str, calls: Sequence[Any]) -> str:
  """The tests that the agent sees."""
  lines = [
    "import unittest",
    f"from solution import {name}",
    "",
    "class Test(unittest.TestCase):",
  ]
  for number, (arguments, truth) in enumerate(calls):
    written = ", ".join(repr(argument) for argument in arguments)
    lines += [
      f"  def test_{number}(self):",
      f"    self.assertEqual({name}({written}), {json.loads(truth)!r})",
    ]
  main = ["", "if __name__ == '__main__':", "  unittest.main()", ""]
  return "\n".join(lines + main)
