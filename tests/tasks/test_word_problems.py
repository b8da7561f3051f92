import re

import numpy as np
import pytest

from forge_jax import errors, types
from forge_jax.tasks import splits, word_problems


def play(replies, truth=492):
  """Plays replies; returns (observations, {reward name: value})."""
  environment = word_problems.WordProblemEnvironment("41 * 12?", truth)
  environment.reset()
  observations = []
  for reply in replies:
    observed = environment.respond({"role": "assistant", "content": reply})
    observations.append(observed[0]["content"] if observed else None)
  return observations, {r.name: r.value for r in environment.rewards()}


ERROR = "Error: one operation on two numbers only"


@pytest.mark.parametrize(
  ("replies", "observations", "rewards"),
  [
    (
      ["CALC(41 * 12)", "ANSWER(492)"],
      ["Result: 492", None],
      {"answer": 1.0},
    ),
    (["CALC(41x12)", "ANSWER(492)"], ["Result: 492", None], {"answer": 1.0}),
    (
      ["CALC( 41 × 12 )", " ANSWER( 492 )\n"],
      ["Result: 492", None],
      {"answer": 1},
    ),
    (["CALC(41 + 12)", "ANSWER(53)"], ["Result: 53", None], {}),
    (["CALC(41 - 53)", "ANSWER(-12)"], ["Result: -12", None], {}),
    # A wrong call, and the right answer all the same: it came after a call.
    (["CALC(41 + 12)", "ANSWER(492)"], ["Result: 53", None], {"answer": 1.0}),
    (
      ["CALC(41 * 12)", "ANSWER(493)"],
      ["Result: 492", None],
      {"right_call": 0.3},
    ),
    # Two calls use up the turns.
    (
      ["CALC(41 * 12)", "CALC(41 * 12)"],
      ["Result: 492", None],
      {"right_call": 0.3},
    ),
    (
      ["CALC(40 * 12 + 12)", "CALC(41 * 12)"],
      [ERROR, None],
      {"right_call": 0.3, "malformed": -0.1},
    ),
    (
      ["CALC(41, 12)", "ANSWER(492)"],
      [ERROR, None],
      {"answer": 1.0, "malformed": -0.1},
    ),
    (["CALC(", "CALC("], [ERROR, None], {"malformed": -0.1}),
    (
      ["CALC(41 * 12)", "It is 492."],
      ["Result: 492", None],
      {"right_call": 0.3, "malformed": -0.1},
    ),
    (["ANSWER(492)"], [None], {}),
    (["The result is 492."], [None], {"malformed": -0.1}),
    ([""], [None], {"malformed": -0.1}),
    (["CALC(41 * 12) ANSWER(492)"], [ERROR], {"malformed": -0.1}),
    (["CALC(1234567 * 12)"], [ERROR], {"malformed": -0.1}),
  ],
)
def test_episode(replies, observations, rewards):
  assert play(replies) == (observations, rewards)


def test_components_and_success():
  environment = word_problems.WordProblemEnvironment("?", 5)
  environment.respond({"role": "assistant", "content": "CALC(2, 3)"})
  environment.respond({"role": "assistant", "content": "ANSWER(5)"})
  assert environment.rewards() == [
    types.Reward(word_problems.SUCCESS, types.Component.PERF, 1.0),
    types.Reward("malformed", types.Component.PROCESS, -0.1),
  ]


def test_an_absent_content_is_malformed_and_the_end_is_the_end():
  environment = word_problems.WordProblemEnvironment("?", 5)
  assert environment.respond({"role": "assistant", "content": None}) is None
  with pytest.raises(ValueError, match="over"):
    environment.respond({"role": "assistant", "content": "CALC(2 + 3)"})


def domain(seed=0):
  return word_problems.WordProblems(word_problems.WordProblemsConfig(seed=seed))


def questions(seed, split, count):
  return [domain(seed).task(split, i).payload["question"] for i in range(count)]


def test_tasks_are_a_function_of_seed_split_and_index():
  assert questions(3, "train", 20) == questions(3, "train", 20)
  assert questions(3, "train", 20) != questions(4, "train", 20)
  assert domain().task("train", 7) == domain().task("train", 7)
  assert domain().task("train", 7).id == "word_problems/train/7"


@pytest.mark.parametrize("split", ["heldout", "phrasings"])
def test_evaluation_does_not_depend_on_the_seed(split):
  assert questions(0, split, 20) == questions(1, split, 20)


def test_no_question_is_in_two_splits():
  train = {q for seed in (0, 1, 2) for q in questions(seed, "train", 600)}
  heldout = set(questions(0, "heldout", 600))
  phrasings = set(questions(0, "phrasings", 600))
  assert not train & heldout
  assert not train & phrasings
  # Not by luck: the two sides are told apart by the question alone.
  assert all(splits.is_heldout(q) for q in heldout)
  assert not any(splits.is_heldout(q) for q in train)


@pytest.mark.parametrize("split", ["train", "heldout", "phrasings"])
def test_operators_numbers_and_truth(split):
  tasks = [domain().task(split, i).payload for i in range(600)]
  share = {o: np.mean([t["operator"] == o for t in tasks]) for o in "+-*"}
  expected = (
    {"+": 2, "-": 2, "*": 2}
    if split == "phrasings"
    else {
      "+": 1,
      "-": 2,
      "*": 3,
    }
  )
  for operator, sixths in expected.items():
    assert share[operator] == pytest.approx(sixths / 6, abs=0.07)
  for task in tasks:
    numbers = [int(w) for w in task["question"].split() if w.isdigit()]
    numbers += [
      int(w[:-1])
      for w in task["question"].split()
      if w[:-1].isdigit() and not w.isdigit()
    ]
    high, low = max(numbers), min(numbers)
    assert 41 <= high <= 99 and 11 <= low <= 39
    truth = {"+": high + low, "-": high - low, "*": high * low}
    assert task["truth"] == truth[task["operator"]]


def test_opening():
  task = domain().task("train", 0)
  messages = domain().environment(task).reset()
  assert [m["role"] for m in messages] == [
    "system",
    "user",
    "assistant",
    "user",
    "assistant",
    "user",
  ]
  assert messages[0]["content"] == (
    "Use CALC(a + b), CALC(a - b) or CALC(a * b) for one step. "
    "When you know the result write ANSWER(number)."
  )
  assert messages[2]["content"] == "CALC(5 + 8)"
  assert messages[-1]["content"] == task.payload["question"]


def test_a_wrong_split_is_named():
  with pytest.raises(errors.ConfigError, match=r"'test'.*'heldout'"):
    domain().task("test", 0)
  with pytest.raises(errors.ConfigError, match="-1"):
    domain().task("train", -1)


@pytest.mark.parametrize("split", ["train", "heldout", "phrasings"])
def test_every_six_questions_have_each_template_once(split):
  domain = word_problems.WordProblems(word_problems.WordProblemsConfig(seed=3))
  shape = lambda q: re.sub(r"[0-9]+", "N", q)
  names = "|".join(word_problems._NAMES)
  things = "|".join(word_problems._THINGS)
  rounds = []
  for start in range(0, 60, 6):
    found = [
      re.sub(
        f"{names}|{things}",
        "X",
        shape(domain.task(split, i).payload["question"]),
      )
      for i in range(start, start + 6)
    ]
    assert len(set(found)) == 6
    rounds.append(tuple(found))
  assert len(set(rounds)) > 1  # the order within a round is shuffled
