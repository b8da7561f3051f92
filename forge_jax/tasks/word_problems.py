"""Word problems to be solved with a one-operation calculator.

An episode takes at most two assistant turns: a call such as `CALC(41 * 12)`,
which the environment answers with the result, and then `ANSWER(492)`.

Splits, each an endless sequence of questions in which every six, from the
first on, have each template once, so that no batch lacks an operation for long:
  train      six templates; depends on the domain's seed
  heldout    the same templates; the same questions for every seed
  phrasings  six templates that `train` never uses; the same for every seed
No question of `heldout` ever occurs in `train`: a digest of its text puts
every question on one side or the other.

Rewards, all of the episode as a whole:
  answer      perf +1.0     the right ANSWER, after a call
  right_call  perf +0.3     a call gave the right value, but no right ANSWER
  malformed   process -0.1  once, if anything was malformed
"""

from collections.abc import Sequence
import dataclasses
import re

import numpy as np

from forge_jax import errors, types
from forge_jax.tasks import base, splits

SUCCESS = "answer"  # the reward whose presence makes an episode a success

_SYSTEM = (
  "Use CALC(a + b), CALC(a - b) or CALC(a * b) for one step. "
  "When you know the result write ANSWER(number)."
)
_OPENING = (
  {"role": "system", "content": _SYSTEM},
  {
    "role": "user",
    "content": ("Kim has 5 cats and gets 8 more. How many cats does Kim have?"),
  },
  {"role": "assistant", "content": "CALC(5 + 8)"},
  {"role": "user", "content": "Result: 13"},
  {"role": "assistant", "content": "ANSWER(13)"},
)
_NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Max", "Ida", "Leo", "Zoe")
_THINGS = (
  "pens",
  "books",
  "cards",
  "shells",
  "coins",
  "stamps",
  "apples",
  "marbles",
)
# (operator, text); n and m are names, t a thing, a and b numbers.
_TRAIN_TEMPLATES = (
  ("+", "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?"),
  (
    "-",
    "{n} has {a} {t} and gives {b} to {m}. How many {t} does {n} have now?",
  ),
  ("-", "{n} had {a} {t} and lost {b}. How many {t} are left?"),
  (
    "*",
    "{n} has {a} boxes with {b} {t} in each box. How many {t} does {n} have?",
  ),
  (
    "*",
    "Each of {b} friends has {a} {t}. How many {t} do the friends have in all?",
  ),
  (
    "*",
    "{n} buys {a} {t} for {b} dollars each. How many dollars does {n} pay?",
  ),
)
_UNSEEN_TEMPLATES = (
  (
    "+",
    "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?",
  ),
  ("+", "{n} has {a} {t} and finds {b} more. What is the total?"),
  ("-", "{n} has {a} {t} and sells {b} of them. How many {t} remain?"),
  (
    "-",
    "There are {a} {t} on a table and {n} takes {b} away. "
    "How many {t} are still there?",
  ),
  (
    "*",
    "There are {b} shelves with {a} {t} on every shelf. "
    "How many {t} are there?",
  ),
  ("*", "{n} makes {a} {t} a day for {b} days. How many {t} does {n} make?"),
)

_CALL = re.compile(r"CALC\( ?(-?[0-9]{1,6}) ?([+\-*x×]) ?(-?[0-9]{1,6}) ?\)")
_ANSWER = re.compile(r"ANSWER\( ?(-?[0-9]{1,8}) ?\)")
_MAX_TURNS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class WordProblemsConfig:
  """Configures the domain."""

  seed: int = 0  # of the train split only
  max_tokens: int = 16  # most new tokens of one assistant turn


class WordProblems:
  """The domain; see the module's docstring."""

  def __init__(self, config: WordProblemsConfig):
    self._config = config
    # split -> (seed, stream, templates, side of the digest or None)
    self._splits = {
      "train": (config.seed, 0, _TRAIN_TEMPLATES, False),
      "heldout": (0, 1, _TRAIN_TEMPLATES, True),
      "phrasings": (0, 2, _UNSEEN_TEMPLATES, None),
    }

  @property
  def name(self) -> str:
    return "word_problems"

  @property
  def max_tokens(self) -> int:
    return self._config.max_tokens

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; its payload has question, operator and truth.

    Raises:
      ConfigError: there is no such split, or the index is negative.
    """
    if split not in self._splits:
      raise errors.ConfigError(
        f"{self.name} has no split {split!r}; it has {sorted(self._splits)}"
      )
    if index < 0:
      raise errors.ConfigError(f"a task's index is >= 0, not {index}")
    seed, stream, templates, heldout = self._splits[split]
    entropy = [seed, stream, index]
    rng = np.random.default_rng(np.random.SeedSequence(entropy))
    template = _template(templates, seed, stream, index)
    payload = _draw(rng, *template)
    while (
      heldout is not None and splits.is_heldout(payload["question"]) != heldout
    ):
      payload = _draw(rng, *template)
    return types.Task(
      id=f"{self.name}/{split}/{index}",
      domain=self.name,
      index=index,
      payload=payload,
    )

  def environment(self, task: types.Task) -> base.Environment:
    return WordProblemEnvironment(
      task.payload["question"], task.payload["truth"]
    )


class WordProblemEnvironment:
  """One question, its calculator and its verifier."""

  def __init__(self, question: str, truth: int):
    self._question = question
    self._truth = truth
    self._turns = 0
    self._done = False
    self._answered = False  # the right ANSWER came after a call
    self._right_call = False
    self._malformed = False

  @property
  def tools(self) -> Sequence[types.Message]:
    """None: the calculator is called in plain text."""
    return ()

  def reset(self) -> types.Messages:
    return [
      *(dict(message) for message in _OPENING),
      {"role": "user", "content": self._question},
    ]

  def respond(self, reply: types.Message) -> types.Messages | None:
    """The calculator's answer; None after ANSWER, other text or two turns.

    Raises:
      ValueError: the episode is over.
    """
    if self._done:
      raise ValueError("the episode is over: it takes no further reply")
    self._turns += 1
    observation = self._observe((reply.get("content") or "").strip())
    if observation is None or self._turns == _MAX_TURNS:
      self._done = True
      return None
    return [{"role": "user", "content": observation}]

  def rewards(self) -> Sequence[types.Reward]:
    rewards = []
    if self._answered:
      rewards.append(types.Reward(SUCCESS, types.Component.PERF, 1.0))
    elif self._right_call:
      rewards.append(types.Reward("right_call", types.Component.PERF, 0.3))
    if self._malformed:
      rewards.append(types.Reward("malformed", types.Component.PROCESS, -0.1))
    return rewards

  def _observe(self, text: str) -> str | None:
    """Scores one turn; returns what the calculator says, if anything."""
    if match := _ANSWER.fullmatch(text):
      # The episode would be over, had its first turn not been a call.
      after_a_call = self._turns > 1
      self._answered = after_a_call and int(match[1]) == self._truth
      return None
    if match := _CALL.fullmatch(text):
      value = _calculate(int(match[1]), match[2], int(match[3]))
      self._right_call = self._right_call or value == self._truth
      return f"Result: {value}"
    self._malformed = True
    if text.startswith("CALC("):
      return "Error: one operation on two numbers only"
    return None


def _template(
  templates: Sequence[tuple[str, str]], seed: int, stream: int, index: int
) -> tuple[str, str]:
  """The operator and text of a question: a shuffled round of all, repeated."""
  turn, place = divmod(index, len(templates))
  # One number more than a question's own entropy: another random stream.
  entropy = [seed, stream, turn, len(templates)]
  rng = np.random.default_rng(np.random.SeedSequence(entropy))
  return templates[rng.permutation(len(templates))[place]]


def _draw(
  rng: np.random.Generator, operator: str, template: str
) -> dict[str, str | int]:
  """Draws a question: a in 41..99, b in 11..39, two different names."""
  n, m = (_NAMES[i] for i in rng.permutation(len(_NAMES))[:2])
  thing = _THINGS[rng.integers(len(_THINGS))]
  a, b = int(rng.integers(41, 100)), int(rng.integers(11, 40))
  return {
    "question": template.format(n=n, m=m, t=thing, a=a, b=b),
    "operator": operator,
    "truth": _calculate(a, operator, b),
  }


def _calculate(a: int, operator: str, b: int) -> int:
  if operator == "+":
    return a + b
  return a - b if operator == "-" else a * b
