"""Reasoning: tasks of reasoning-gym, scored in a sandbox.

Splits: train, heldout; see `splits`. Difficulty: `level` steps of the curriculum
that reasoning-gym has for each dataset.

Rewards:
  answer     perf +1.0     the dataset's verifier gives the full score, or
                           math-verify finds the answer equal
  no_answer  process -0.1  the reply has no <answer>...</answer>
"""

from collections.abc import Mapping, Sequence
import dataclasses
import random
from typing import Any

from reasoning_gym.factory import CURRICULA

from forge_jax import errors, types
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.tasks import answers, judge, judge_guest, splits


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningConfig:
  """Which datasets, and how hard."""

  datasets: tuple[str, ...] = (
    "calendar_arithmetic",
    "chain_sum",
    "fraction_simplification",
    "gcd",
    "letter_counting",
    "word_sorting",
  )
  level: int = 0  # 0: the easiest
  seed: int = 0  # of the train split only
  max_tokens: int = 512  # most new tokens of a reply

  def __post_init__(self):
    for name in self.datasets:
      if name not in CURRICULA:
        raise errors.ConfigError(
          f"reasoning dataset {name!r} is unknown, or reasoning-gym has no "
          f"curriculum for it; known: {', '.join(sorted(CURRICULA))}"
        )
    if not self.datasets or self.level < 0:
      raise errors.ConfigError(
        f"reasoning has {len(self.datasets)} datasets at level {self.level}; "
        "expected at least 1, and 0"
      )


class Reasoning:
  """The domain; see the module's docstring."""

  name = "reasoning"

  def __init__(self, config: ReasoningConfig, sandbox: sandbox_base.Backend):
    """Prepares the datasets.

    Args:
      config: which.
      sandbox: where answers are parsed; shows `judge.packages()`.
    """
    self._config = config
    self._sandbox = sandbox
    self._judge = judge.Judge(sandbox)
    self.max_tokens = config.max_tokens

  def at(self, level: int) -> "Reasoning":
    """The same domain with tasks of another difficulty."""
    config = dataclasses.replace(self._config, level=level)
    return Reasoning(config, self._sandbox)

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; its payload has question, answer and their origin."""
    return splits.draw(self.name, split, index, self._config.seed, self._make)

  def environment(self, task: types.Task) -> "ReasoningEnvironment":
    """A fresh environment for one episode of the task."""
    return ReasoningEnvironment(task.payload, self._judge)

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What the policy "random" or "optimal" replies; random: a small number."""
    if policy == "optimal":
      return [answers.reply(task.payload["answer"])]
    return [answers.reply(str(random.Random(task.id).randrange(10)))]

  def _make(self, rng: random.Random) -> dict[str, Any]:
    name = rng.choice(self._config.datasets)
    level, item = self._config.level, rng.randrange(judge_guest.ITEMS)
    entry = judge_guest.make_dataset(name, level)[item]
    return {
      "question": entry["question"],
      "answer": entry["answer"],
      "dataset": name,
      "level": level,
      "item": item,
    }


class ReasoningEnvironment(answers.Question):
  """One question and its verifier."""

  def __init__(self, payload: Mapping[str, Any], judge_: judge.Judge):
    super().__init__(payload["question"])
    self._payload = payload
    self._judge = judge_

  async def rewards(self) -> Sequence[types.Reward]:
    """What the answer is worth.

    Raises:
      SandboxError: it could not be judged.
    """
    if self.answer is None:
      return self.unanswered
    case = {key: self._payload[key] for key in ("dataset", "level", "item")}
    # What is right letter for letter needs no program that says so.
    right = self.answer == self._payload["answer"]
    if not right:
      right = await self._judge.is_right(case | {"answer": self.answer})
    return [types.Reward("answer", types.Component.PERF, 1.0)] if right else []
