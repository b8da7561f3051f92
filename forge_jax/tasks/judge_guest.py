"""Judges answers of reasoning-gym tasks; runs in a sandbox, see `judge`.

  python judge_guest.py SECONDS < cases.json > verdicts.json

A case has the `dataset`, the `level` and the `item` that was asked, and the
`answer`. It is right if the dataset's own verifier gives it the full score, or, where the
answer is mathematical, if math-verify finds it equal to the dataset's answer.
"""

import functools
import json
import os
import select
import signal
import sys

import math_verify
from reasoning_gym import factory

MATHEMATICAL = ("algebra", "arithmetic")  # categories of reasoning-gym
FULL = 1 - 1e-6
ITEMS = 2**31  # of a dataset; each is a function of its number


@functools.cache
def make_dataset(name: str, level: int):
  """A dataset of reasoning-gym at a level of its curriculum."""
  curriculum = factory.create_curriculum(name)
  curriculum.set_global_level(level)
  config = curriculum.generate_configuration({"seed": 0, "size": ITEMS})
  return factory.DATASETS[name][0](config)


def is_right(case: dict) -> bool:
  """Whether the case's answer is right."""
  answer = case["answer"]
  if "__" in answer:  # the way from an expression to the whole of Python
    return False
  dataset = make_dataset(case["dataset"], case["level"])
  entry = dataset[case["item"]]
  if dataset.score_answer(answer, entry) >= FULL:
    return True
  if dataset.category not in MATHEMATICAL:
    return False
  # Time is limited from outside; their own limits would use the same signal.
  truth = parse(entry["answer"])
  return bool(truth) and math_verify.verify(
    truth, parse(answer), timeout_seconds=None
  )


def parse(text: str) -> list:
  """The expression that a text is, whether in LaTeX's dollars or not."""
  found = math_verify.parse(text, parsing_timeout=None)
  return found or math_verify.parse(f"${text}$", parsing_timeout=None)


def judge(case: dict, seconds: float) -> bool:
  """Judges in a process of its own, which ends after so many seconds."""
  reader, writer = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      os.write(writer, b"1" if is_right(case) else b"0")
    finally:
      os._exit(0)
  os.close(writer)
  ready, _, _ = select.select([reader], [], [], seconds)
  verdict = os.read(reader, 1) if ready else b""
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  os.close(reader)
  return verdict == b"1"


def main() -> None:
  cases = json.load(sys.stdin)
  seconds = float(sys.argv[1])
  # What a verifier prints must not get among the verdicts.
  out = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  json.dump([judge(case, seconds) for case in cases], out)
  out.close()


if __name__ == "__main__":
  main()
