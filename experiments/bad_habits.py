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
Hardware: two CPU cores, a minute a run on idle ones.
Result:   docs/results/parallel_calls.md, docs/results/malformed_calls.md,
          2026-11-30. Speed, seed 0: success the same, median time 40% below that
          of success alone; seed 1, stopped early, does not show it. Process: not
          shown to be five times as fast.

All arms begin with the same weights and have the same tasks and tools; they
differ in one factor each. The time is the run's own metric, the wall-clock of an
episode with its tools (`domain_seconds/records`, a median).
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
_TIME = flags.DEFINE_list(
  "time", [], "models to time instead, with tools of two seconds"
)
_STEPS = flags.DEFINE_integer("trainer_steps", 20, "of a run")
SECONDS = "domain_seconds/records"
MALFORMED = "noted/malformed_call"


def get_config() -> ml_collections.ConfigDict:
  """What all arms share."""
  config = bad_habits_warm_start.get_config().unlock()
  config.name = "bad_habits"
  config.question = __doc__.partition("\n")[0]
  config.imitate = ()
  del config.scratch
  config.domains.records.seconds = 0.5
  config.domains.records.max_tokens = 80
  config.agent.max_turns = 5
  config.curation.replay = 0.0
  config.credit.baseline = "mean"
  config.rollout.update(group_size=8, temperature=1.0, in_flight=16, max_lag=1)
  config.trainer.update(
    groups_per_step=8,
    ratio_min=0.0,
    ratio_max=5.0,
    learning_rate=5e-4,
    warmup_updates=0,
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
  """Samples 128 episodes of a model with tools of two seconds; a table's line.

  It is a run at learning rate 0, so that the figures are those of any run; the
  first of its two steps, in which programs are compiled, is left out.
  """
  launch(
    folder,
    {
      "model.path": str(pathlib.Path(model).absolute()),
      "steps": 2,
      "seed": 100,
      "eval.heldout": 0,
      "trainer.learning_rate": 0.0,
      "domains.records.seconds": 2.0,
      "rollout.in_flight": 8,
      "rollout.max_lag": 0,
    },
  )
  success, seconds, answers = (
    arms_lib.read(folder, name)[1][-1]
    for name in ("train/success", SECONDS, "noted/answer")
  )
  # Right answers of an episode over those of a completion: its completions.
  return (
    f"| {model} | {success:.1%} | {seconds:.2f} | {success / answers:.2f} |"
  )


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


def row(folder: pathlib.Path, arm: str, seed: int) -> str:
  """A line of the table."""
  summary: Mapping[str, Any] = json.loads((folder / "summary.json").read_text())
  read = {
    name: arms_lib.read(folder, name)[1]
    for name in ("train/success", SECONDS, MALFORMED)
  }
  success, seconds, malformed = (
    early_and_late(values) for values in read.values()
  )
  return (
    f"| {arm} | {seed} | {summary['heldout_before']:.1%} "
    f"| {summary['heldout_after']:.1%} | {success[0]:.1%} | {success[1]:.1%} "
    f"| {seconds[0]:.2f} | {seconds[1]:.2f} | {malformed[0]:.1%} "
    f"| {malformed[1]:.1%} | {halved(read[MALFORMED])} |"
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
    "| seconds: first | last | malformed: first | last | halved at step |"
  )
  print("| --- " * 11 + "|")
  print("\n".join(rows))
  if drawing.PICTURE.value:
    for name, arm, metrics in (
      ("parallel_calls", "speed", ["train/success", SECONDS]),
      ("malformed_calls", "process", ["train/success", MALFORMED]),
    ):
      pair = {label: folders[label] for label in ("success", arm)}
      drawing.write(name, arms_lib.draw(pair, metrics))


if __name__ == "__main__":
  app.run(main)
