"""CISPO beside GRPO's clipping, on replies of weights 0, 4 and 16 steps old.

Question: CISPO bounds a token's weight and keeps its gradient; GRPO's clipped
surrogate drops the gradient of a token whose ratio has left its bounds. The older
the weights that sampled, the more tokens that are. Which learns better then?

Command:  python -m experiments.cispo_grpo --seeds=0,1,2 \\
            --picture --folder=docs/results
Hardware: two CPU cores, two minutes on idle ones.
Result:   docs/results/cispo_grpo.md, 2026-11-30. After 60 steps, seeds 0, 1, 2:
          the same at lag 0; 68.6%, 77.9%, 74.8% beside 67.4%, 77.1%, 74.2% at
          lag 4; 65.6%, 77.9%, 76.4% beside 59.2%, 69.7%, 70.5% at lag 16.

Both begin with the same pupil (experiments/toys/school.py), have the same tasks,
seeds, learning rate and optimizer, and differ in `trainer.loss` and its bounds,
which are those of their papers. The lag is exact.
"""

from collections.abc import Sequence
import pathlib

from absl import app

from experiments.figures import arms, drawing, runs
from experiments.toys import school as school_lib
from experiments.toys import substitution
from forge_jax.trainer import update

LAGS = (0, 4, 16)
IMITATION, STEPS = 52, 60
DOMAIN = substitution.Substitution(0, seed=0)
EVAL = f"eval/{DOMAIN.name}"
LOSSES = {
  "CISPO": update.UpdateConfig(learning_rate=1e-3),
  "GRPO-clip": update.UpdateConfig(
    learning_rate=1e-3, loss="grpo_clip", ratio_min=0.8, ratio_max=1.2
  ),
}


def run(school: school_lib.School, seed: int) -> None:
  """The runs of a seed."""
  pupil = school.pupil(seed, IMITATION)
  for lag in LAGS:
    for loss, config in LOSSES.items():
      runs.kept(
        place(loss, lag, seed),
        lambda config=config, lag=lag: school.learn(
          pupil, config, seed=seed, steps=STEPS, lag=lag
        ),
      )


def place(loss: str, lag: int, seed: int) -> pathlib.Path:
  """The folder of a run."""
  return runs.place("cispo_grpo", f"{loss}-lag{lag}", seed)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  school = school_lib.School([DOMAIN])
  print("| lag | loss | seed | before | after | mean | least | gradient lost |")
  print("| --- | --- | --- | --- | --- | --- | --- | --- |")
  seeds = [int(seed) for seed in runs.SEEDS.value]
  for seed in seeds:
    run(school, seed)
  panels = {}
  for lag in LAGS:
    panels[f"held-out success, lag {lag}"] = panel = {}
    for loss in LOSSES:
      folders = [place(loss, lag, seed) for seed in seeds]
      panel[loss] = [arms.read(one, EVAL) for one in folders]
      for one, seed in zip(folders, seeds, strict=True):
        print(row(one, lag, loss, seed), flush=True)
  if drawing.PICTURE.value:
    drawing.write("cispo_grpo", arms.curves(panels))


def row(folder: pathlib.Path, lag: int, loss: str, seed: int) -> str:
  """A line of the table."""
  _, success = arms.read(folder, EVAL)
  _, clipped = arms.read(folder, "ratio/clipped")
  mean = sum(success) / len(success)
  lost = sum(clipped) / len(clipped) if loss == "GRPO-clip" else 0.0
  return (
    f"| {lag} | {loss} | {seed} | {success[0]:.1%} | {success[-1]:.1%} "
    f"| {mean:.1%} | {min(success):.1%} | {lost:.1%} |"
  )


if __name__ == "__main__":
  app.run(main)
