"""What every domain promises: splits, levels, and what policies reach."""

import asyncio
import dataclasses
import json

import pytest

from forge_jax import errors, types
from forge_jax.agents import scripted
from forge_jax.rollout import baselines
from forge_jax.tasks import (
  answers,
  bug_fixing,
  deep_search,
  judge,
  library_qa,
  reasoning,
  slow_tools,
  splits,
  terminal,
)

PERF = types.Component.PERF
# Least success of knowing nothing, with room for chance.
LUCK = {
  "bug_fixing": 0.5,
  "deep_search": 0.1,
  "library_qa": 0.2,
  "reasoning": 0.4,
  "slow_tools": 0.95,
  "terminal": 0.4,
}


@pytest.fixture(params=sorted(LUCK))
def domain(request, sandbox):
  return {
    "bug_fixing": lambda: bug_fixing.BugFixing(
      bug_fixing.BugFixingConfig(), sandbox
    ),
    "deep_search": lambda: deep_search.DeepSearch(
      deep_search.DeepSearchConfig()
    ),
    "library_qa": lambda: library_qa.LibraryQA(library_qa.LibraryQAConfig()),
    "reasoning": lambda: reasoning.Reasoning(
      reasoning.ReasoningConfig(), sandbox
    ),
    "slow_tools": lambda: slow_tools.SlowTools(
      slow_tools.SlowToolsConfig(seconds=0.01)
    ),
    "terminal": lambda: terminal.Terminal(terminal.TerminalConfig()),
  }[request.param]()


def test_tasks_are_json_and_repeat(domain):
  for split in splits.SPLITS:
    for index in range(20):
      task = domain.task(split, index)
      assert task.id == f"{domain.name}/{split}/{index}"
      payload = json.loads(json.dumps(task.payload))
      assert payload == task.payload == domain.task(split, index).payload
  with pytest.raises(errors.ConfigError, match="no split 'test'"):
    domain.task("test", 0)
  with pytest.raises(errors.ConfigError, match="not -1"):
    domain.task("train", -1)


def test_what_is_held_out_is_never_trained_on(domain):
  train, heldout = (
    {domain.task(split, i).payload["question"] for i in range(150)}
    for split in splits.SPLITS
  )
  assert not train & heldout
  assert len(train) > 20 and len(heldout) > 10


def test_levels_are_harder_by_what_there_is_to_read(domain):
  def size(level):
    tasks = [domain.at(level).task("train", i) for i in range(30)]
    return sum(len(json.dumps(task.payload)) for task in tasks)

  assert domain.at(0).task("train", 3) == domain.task("train", 3)
  if domain.name != "bug_fixing":  # there a level is a number of changes
    assert size(0) < size(1) < size(2)
  with pytest.raises(errors.ConfigError, match="level"):
    domain.at(-1)


async def test_the_optimal_script_succeeds_and_chance_does_not(domain, sandbox):
  count = 4
  for split in splits.SPLITS:
    best = await baselines.play(domain, split, count, "optimal", sandbox)
    assert best.success_rate == 1.0
  luck = await baselines.play(domain, "heldout", count, "random", sandbox)
  assert luck.success_rate <= LUCK[domain.name]
  assert luck.mean_reward < best.mean_reward == 1.0


async def test_a_baseline_needs_a_script(sandbox):
  @dataclasses.dataclass
  class Silent:
    name: str = "silent"

  with pytest.raises(errors.ConfigError, match="silent"):
    await baselines.play(Silent(), "train", 1, "optimal", sandbox)


async def rewards_of(environment, *replies):
  await scripted.ScriptedAgent(replies).run(environment)
  found = environment.rewards()
  return {r.name: r.value for r in found}


async def test_answers_are_judged_by_what_they_mean(sandbox):
  domain = reasoning.Reasoning(
    reasoning.ReasoningConfig(datasets=("fraction_simplification",)), sandbox
  )
  task = next(
    t
    for i in range(99)
    if "/" in (t := domain.task("train", i)).payload["answer"]
    and "$" not in t.payload["answer"]
  )
  truth = task.payload["answer"]
  top, bottom = truth.split("/")
  said = {
    truth: True,
    f"\\frac{{{top}}}{{{bottom}}}": True,
    f"{top} / {bottom}": True,
    f"{bottom}/{top}": False,
    "I do not know": False,
    "().__class__": False,
    "9**9**9**9**9": False,  # never ends: the others do not wait for ever
  }
  cases = {k: task.payload[k] for k in ("dataset", "level", "item")}
  judging = judge.Judge(sandbox, seconds=5.0)
  async with asyncio.TaskGroup() as group:
    runs = {
      answer: group.create_task(judging.is_right(cases | {"answer": answer}))
      for answer in said
    }
  assert {answer: run.result() for answer, run in runs.items()} == said


async def test_a_judge_that_cannot_judge_says_so(sandbox):
  case = {"dataset": "gcd", "level": 0, "item": 0, "answer": "1"}

  class Broken:
    async def open(self):
      raise errors.SandboxError("no sandbox today")

  with pytest.raises(errors.SandboxError, match="today"):
    await judge.Judge(Broken()).is_right(case)


def test_words_are_compared_as_squad_does():
  assert answers.words("The Cat, sat.") == answers.words("cat sat")
  assert answers.overlap("a cat sat down", "the cat sat") == pytest.approx(0.8)
  assert answers.overlap("dog", "cat") == 0.0
  assert answers.find("<answer>1</answer> no, <answer> 2 </answer>") == "2"
  assert answers.find("42") is None


async def test_part_of_a_quotation_is_paid_in_part():
  question = library_qa.LibraryQuestion("?", "Return the root.", False)
  assert await rewards_of(question, answers.reply("return a root")) == {
    "answer": 1.0
  }
  question = library_qa.LibraryQuestion("?", "Return the root.", False)
  assert await rewards_of(question, answers.reply("root")) == {
    "overlap": pytest.approx(0.3 * 2 / 3)
  }
  question = library_qa.LibraryQuestion("?", "fsum", True)
  assert await rewards_of(question, answers.reply("Fsum")) == {}
  assert await rewards_of(question, {"content": "fsum"}) == {"no_answer": -0.1}


async def test_parallel_calls_take_as_long_as_the_slowest():
  domain = slow_tools.SlowTools(slow_tools.SlowToolsConfig(level=6))
  task = domain.task("train", 0)
  waited = []

  async def sleep(seconds):
    running.append(seconds)
    await real_sleep(0)
    waited.append(len(running))
    running.remove(seconds)

  running, real_sleep = [], asyncio.sleep
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(slow_tools.asyncio, "sleep", sleep)
    for policy in ("optimal", "sequential"):
      found = await rewards_of(
        domain.environment(task), *domain.script(task, policy)
      )
      assert found == {"answer": 1.0}
  assert waited[:8] == [8, 7, 6, 5, 4, 3, 2, 1] and waited[8:] == [1] * 8


async def test_an_answer_that_was_not_looked_up_is_a_guess():
  domain = slow_tools.SlowTools(slow_tools.SlowToolsConfig(seconds=0))
  task = domain.task("train", 0)
  right = answers.reply(task.payload["answer"])
  assert await rewards_of(domain.environment(task), right) == {}
