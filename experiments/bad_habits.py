"""Do speed and process rewards unlearn what success alone lets pass?

Question: a model that looks names up (experiments/bad_habits_warm_start.py) succeeds,
but six of ten episodes do so one name after another though a look-up takes its
time, and three begin with a call that is none. RL for success alone has little
against either. Does the speed reward make it look names up at once, and the
process reward make malformed calls vanish, without loss of success?

Command:  python -m experiments.bad_habits [--picture --folder=docs/results]
          after the warm start that experiments/bad_habits_warm_start.py names.
One arm:  --only=speed --seeds=0, which is
          python -m launch.train --config=experiments/bad_habits.py
          with --config.credit.beta=2, and its model and steps.
Policies: python -m experiments.bad_habits --time=MODEL,MODEL
Hardware: two CPU cores, two and a half minutes a run beside other programs.
Result:   docs/results/parallel_calls.md, docs/results/malformed_calls.md,
          2026-12-01, seeds 0, 1 and 2. Speed: median time 45%, 45% and 42% below
          that of success alone, success the same in two and 6 points lower in
          seed 2, and twice the malformed calls. Process: they fall 29, 18
          and 20 times as fast as with success alone.

All arms begin with the same weights and have the same tasks and tools; they
differ in one factor each. The time is the run's own metric, the wall-clock of an
episode with its tools (`domain_seconds/records`, a median). How fast malformed
calls fall is, by the step, how much the logarithm of their share of all replies
falls along a line of least squares through a run's steps (`fall`); beside it the
step at which they have halved.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from absl import app, flags, logging
import ml_collections
import numpy as np

from experiments import bad_habits_warm_start
from experiments.figures import arms as arms_lib
from experiments.figures import drawing, runs

_START = flags.DEFINE_string(
  "start", "runs/bad_habits_warm_start/model", "model to begin with"
)
ARMS = {
  "success": {},
  "speed": {"credit.beta": 2.0},
  "process": {"process.malformed_call": 1.0},
}
_ONLY = flags.DEFINE_list("only", list(ARMS), "which to run and to tell of")
_TIME = flags.DEFINE_list("time", [], "models to time instead, nothing trained")
_TIMED = 4  # steps, of 64 episodes each
_STEPS = flags.DEFINE_integer("trainer_steps", 30, "of a run")
SECONDS = "domain_seconds/records"
ROUNDS, CALLS = "rounds of look-ups an episode", "malformed, of all replies"

Curve = tuple[list[int], list[float]]  # by step


def get_config() -> ml_collections.ConfigDict:
  """What all arms share."""
  config = bad_habits_warm_start.get_config().unlock()
  config.name = "bad_habits"
  config.question = __doc__.partition("\n")[0]
  config.imitate = ()
  del config.scratch
  config.domains.records.seconds = 2.0
  config.domains.records.max_tokens = 80
  config.agent.max_turns = 5
  config.curation.replay = 0.0
  config.credit.baseline = "mean"
  config.rollout.update(group_size=8, temperature=1.0, in_flight=16, max_lag=1)
  config.trainer.update(
    groups_per_step=8,
    ratio_min=0.0,
    ratio_max=5.0,
    learning_rate=3e-4,
    warmup_updates=5,
  )
  config.eval.heldout = 100
  return config.lock()


def launch(folder: pathlib.Path, changes: Mapping[str, Any]) -> None:
  """A run of this file's configuration, but for some values, by their names."""
  command = [sys.executable, "-m", "launch.train", f"--config={__file__}"]
  overrides = [f"--config.{name}={value}" for name, value in changes.items()]
  subprocess.run([*command, f"--workdir={folder}", *overrides], check=True)


def train(arm: str, seed: int, model: str, folder: pathlib.Path) -> None:
  """One run, unless it has ended before."""
  path = str(pathlib.Path(model).absolute())
  values = {"steps": _STEPS.value, "seed": seed, "model.path": path}
  if not (folder / "summary.json").exists():
    launch(folder, values | ARMS[arm])


def time(model: str, folder: pathlib.Path) -> str:
  """Samples episodes of a model, nothing trained; a table's line.

  It is a run at learning rate 0, so that the figures are those of any run, at
  fewer episodes in flight and of 64 a step; the first step, in which programs are
  compiled, is left out.
  """
  launch(
    folder,
    {
      "model.path": str(pathlib.Path(model).absolute()),
      "steps": 1 + _TIMED,
      "seed": 100,
      "eval.heldout": 0,
      "trainer.learning_rate": 0.0,
      "rollout.in_flight": 8,
      "rollout.max_lag": 0,
    },
  )
  right, seconds, turns, broken = (
    values[1:]
    for _, values in (
      success(folder),
      read(folder, SECONDS),
      rounds(folder),
      calls(folder),
    )
  )
  return (
    f"| {model} | {statistics.fmean(right):.1%} "
    f"| {statistics.median(seconds):.2f} | {statistics.fmean(turns):.2f} "
    f"| {statistics.fmean(broken):.1%} |"
  )


def read(folder: pathlib.Path, name: str) -> Curve:
  """A metric by step, 0 where a step has no record of it: nothing was noted."""
  found = dict(zip(*arms_lib.read(folder, name), strict=True))
  steps = arms_lib.read(folder, "train/success")[0]
  return steps, [found.get(step, 0.0) for step in steps]


def success(folder: pathlib.Path) -> Curve:
  """Of a step's sampled episodes."""
  return read(folder, "train/success")


def calls(folder: pathlib.Path) -> Curve:
  """The share of a step's replies that are malformed calls."""
  return read(folder, "noted/malformed_call")


def rounds(folder: pathlib.Path) -> Curve:
  """How often an episode waits for look-ups, on average: replies that are
  neither a malformed call nor the last."""
  steps, right = success(folder)
  answers, broken = read(folder, "noted/answer")[1], calls(folder)[1]
  # Right answers of an episode over those of a reply: its replies.
  return steps, [
    a / b * (1 - c) - 1 for a, b, c in zip(right, answers, broken, strict=True)
  ]


def early_and_late(values: Sequence[float], steps: int = 3) -> tuple:
  """Means over the first and over the last steps."""
  return statistics.fmean(values[:steps]), statistics.fmean(values[-steps:])


def halved(values: Sequence[float], steps: int = 3) -> int | None:
  """The step from which on so many steps have, on average, half the rate of
  the first ones; None: never."""
  start = statistics.fmean(values[:steps])
  for end in range(steps + 1, len(values) + 1):
    if statistics.fmean(values[end - steps : end]) <= start / 2:
      return end - steps + 1
  return None


def fall(values: Sequence[float]) -> float:
  """How much a rate's logarithm falls by the step, along a fitted line.

  A step without any counts as one with half a call of its 200 replies.
  """
  logs = np.log(np.maximum(values, 0.5 / 200))
  return -float(np.polyfit(np.arange(len(logs)), logs, 1)[0])


def row(folder: pathlib.Path, arm: str, seed: int) -> str:
  """A line of the table."""
  summary: Mapping[str, Any] = json.loads((folder / "summary.json").read_text())
  broken = calls(folder)[1]
  right, seconds, turns, malformed = (
    early_and_late(values)
    for values in (
      success(folder)[1],
      read(folder, SECONDS)[1],
      rounds(folder)[1],
      broken,
    )
  )
  return (
    f"| {arm} | {seed} | {summary['heldout_before']:.1%} "
    f"| {summary['heldout_after']:.1%} | {right[0]:.1%} | {right[1]:.1%} "
    f"| {seconds[0]:.2f} | {seconds[1]:.2f} | {turns[0]:.2f} | {turns[1]:.2f} "
    f"| {malformed[0]:.1%} | {malformed[1]:.1%} | {halved(broken)} "
    f"| {fall(broken):.4f} |"
  )


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  for model in _TIME.value:
    folder = runs.place("timed", pathlib.Path(model).name, 0)
    print(time(model, folder), flush=True)
  if _TIME.value:
    return
  folders: dict[str, list[pathlib.Path]] = {arm: [] for arm in _ONLY.value}
  rows = []
  for seed in map(int, runs.SEEDS.value):
    for arm, kept in folders.items():
      folder = runs.place("bad_habits", arm, seed)
      train(arm, seed, _START.value, folder)
      kept.append(folder)
      rows.append(row(folder, arm, seed))
  print(
    "| reward | seed | held out: before | after | sampled: first steps | last "
    "| seconds: first | last | rounds: first | last | malformed: first | last "
    "| halved at step | fall |"
  )
  print("| --- " * 14 + "|")
  print("\n".join(rows))
  if drawing.PICTURE.value:
    for name, arms, title, of in (
      ("parallel_calls", ("success", "speed"), ROUNDS, rounds),
      ("malformed_calls", ("success", "process"), CALLS, calls),
    ):
      panels = {
        panel: {
          arm: list(map(curve, folders[arm])) for arm in arms if arm in folders
        }
        for panel, curve in (("success", success), (title, of))
      }
      drawing.write(name, arms_lib.curves(panels))


if __name__ == "__main__":
  app.run(main)
