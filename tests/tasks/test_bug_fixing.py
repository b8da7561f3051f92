"""Broken functions: how they are broken, and what counts as repaired."""

import ast
import difflib
import inspect
import json
import random
import sys

import pytest

from forge_jax.tasks import bug_fixing, mutation, small_functions

MOST_LINES = 3000  # that a call of a specimen may run, however it is broken


@pytest.fixture
def domain(sandbox):
  return bug_fixing.BugFixing(bug_fixing.BugFixingConfig(), sandbox)


async def scored(domain, task, source):
  environment = domain.environment(task)
  environment.collect({"solution.py": source.encode()})
  return {r.name: r.value for r in await environment.rewards()}


def lines_run(function, arguments):
  count = 0

  def trace(frame, event, argument):
    nonlocal count
    count += event == "line"
    assert count < MOST_LINES
    return trace

  sys.settrace(trace)
  try:
    function(*arguments)
  except (ArithmeticError, LookupError, TypeError, ValueError):
    pass
  finally:
    sys.settrace(None)


@pytest.mark.parametrize("name", sorted(small_functions.SPECIMENS))
def test_a_broken_function_ends(name):
  specimen = small_functions.SPECIMENS[name]
  source, rng = inspect.getsource(specimen.function), random.Random(name)
  for _ in range(30):
    scope = {}
    exec(mutation.mutate(source, rng.randrange(1, 6), rng), scope)
    lines_run(scope[name], json.loads(json.dumps(specimen.arguments(rng))))


def test_a_bug_is_a_change_of_so_many_places():
  source = inspect.getsource(small_functions.longest_rise)
  whole = ast.unparse(ast.parse(source)).split()
  for count in (1, 2, 3):
    for seed in range(20):
      broken = mutation.mutate(source, count, random.Random(seed)).split()
      # A word holds one place at most, and an operator may become two words.
      kept = difflib.SequenceMatcher(None, whole, broken, autojunk=False)
      changed = [op for op in kept.get_opcodes() if op[0] != "equal"]
      assert 1 <= len(changed) <= count
  everything = mutation.mutate(source, 99, random.Random(0)).split()
  assert len(set(everything) - set(whole)) >= 5


async def test_both_kinds_of_calls_count(domain):
  task = domain.task("heldout", 0)
  name = task.payload["function"]
  right = inspect.getsource(small_functions.SPECIMENS[name].function)
  assert await scored(domain, task, right) == {"fixed": 1.0}
  assert await scored(domain, task, task.payload["question"]) == {}
  failing = [
    call
    for call, passes in zip(
      task.payload["hidden"], task.payload["passes"], strict=True
    )
    if not passes
  ]
  # Right where the bug was, and nowhere else.
  table = {json.dumps(arguments): truth for arguments, truth in failing}
  overfit = (
    f"import json\ntable = {table!r}\ndef {name}(*arguments):\n"
    "  return json.loads(table.get(json.dumps(list(arguments)), '[[]]'))\n"
  )
  assert await scored(domain, task, overfit) == {"fail_to_pass": 0.3}


async def test_a_program_that_tampers_is_wrong(domain):
  task = domain.task("train", 0)
  count = len(task.payload["hidden"])
  tricks = [
    f"import os\nprint({[True] * count!r})\nos._exit(0)\n",
    "raise SystemExit(0)\n",
    "import sys\nsys.stdout.write('[' * 10**6)\n",
    "this is no Python\n",
    "",
  ]
  for source in tricks:
    assert await scored(domain, task, source) == {}
  environment = domain.environment(task)
  environment.collect({})
  assert await environment.rewards() == []


async def test_a_repair_that_hangs_costs_seconds(domain, monkeypatch):
  monkeypatch.setattr(bug_fixing, "_SECONDS", 0.5)
  task = domain.task("train", 1)
  assert await scored(domain, task, "while True: pass\n") == {}


async def test_the_tests_show_the_bug(domain, sandbox):
  task = domain.task("train", 2)
  async with await sandbox.open() as box:
    await box.put(domain.environment(task).files())
    argv = ["python3", "-m", "unittest", "-q"]
    broken = await box.run(argv, seconds=20)
    name = task.payload["function"]
    right = inspect.getsource(small_functions.SPECIMENS[name].function)
    await box.put({"solution.py": right.encode()})
    repaired = await box.run(argv, seconds=20)
  assert b"FAILED" in broken.stderr and broken.failure == "exit status 1"
  assert b"Ran 8 tests" in repaired.stderr and repaired.failure is None
