"""Does a mix in every batch forget less than the same steps in stages?

Question: two domains share a policy. Staged, a run trains the first alone and
then the second alone; mixed, every batch has half of each. Tasks of each, steps
and learning rate are the same. How much of its best held-out success in the
first domain has a run lost at its end?

Command:  python -m experiments.mixed_or_staged [--picture --folder=docs/results]
Hardware: two CPU cores, some 20 seconds of one a run.
Result:   docs/results/mixed_or_staged.md, 2026-12-01. Seeds 0, 2, 3 and 4: 0 to 2
          points mixed, 66 to 82 staged. Seeds 1 and 5: 0 mixed, 0 and 13 staged,
          because the first stage left next to nothing of the second domain to
          reinforce: that ends at 90% mixed, 0% staged.

The pupil (experiments/toys/school.py) begins as what imitates both a little.
Stages are courses of the product's curriculum.
"""

from collections.abc import Sequence

from absl import app

from experiments.figures import arms, drawing, runs
from experiments.toys import school as school_lib
from experiments.toys import substitution
from forge_jax.tasks import curriculum
from forge_jax.trainer import update

# Steps. After fewer of imitation the first stage ends the second domain more
# often.
IMITATION, STAGE = 80, 60
DOMAINS = [substitution.Substitution(number, seed=0) for number in range(2)]
FIRST, SECOND = (domain.name for domain in DOMAINS)
UPDATE = update.UpdateConfig(learning_rate=1e-3)
ARMS = {
  "mixed": {},
  "staged": {
    FIRST: curriculum.CourseConfig(weight=((STAGE - 1, 1.0), (STAGE, 0.0))),
    SECOND: curriculum.CourseConfig(weight=((STAGE - 1, 0.0), (STAGE, 1.0))),
  },
}


def forgotten(success: Sequence[float]) -> float:
  """What a run has lost of its best success at its end."""
  return max(success) - success[-1]


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  school = school_lib.School(DOMAINS)
  panels = {f"held-out success, {x}": {} for x in ("first", "second")}
  print("| arm | seed | first: best | at the end | forgotten | second: end |")
  print("| --- | --- | --- | --- | --- | --- |")
  for arm, courses in ARMS.items():
    for seed in map(int, runs.SEEDS.value):
      folder = runs.kept(
        runs.place("mixed_or_staged", arm, seed),
        lambda courses=courses, seed=seed: school.learn(
          school.pupil(seed, IMITATION),
          UPDATE,
          seed=seed,
          steps=2 * STAGE,
          courses=courses,
        ),
      )
      curves = [arms.read(folder, f"eval/{x}") for x in (FIRST, SECOND)]
      for panel, curve in zip(panels.values(), curves, strict=True):
        panel.setdefault(arm, []).append(curve)
      (_, first), (_, second) = curves
      print(
        f"| {arm} | {seed} | {max(first):.1%} | {first[-1]:.1%} "
        f"| {forgotten(first):.1%} | {second[-1]:.1%} |",
        flush=True,
      )
  if drawing.PICTURE.value:
    drawing.write("mixed_or_staged", arms.curves(panels))


if __name__ == "__main__":
  app.run(main)
