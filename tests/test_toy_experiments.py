"""The experiments with toy pupils, at a size that a test can afford."""

import numpy as np
import pytest

from experiments import bad_habits, cispo_grpo, mixed_or_staged
from experiments.figures import arms, runs
from experiments.toys import school as school_lib
from experiments.toys import substitution
from forge_jax.tasks import mixture


@pytest.fixture(scope="module")
def school():
  return school_lib.School(mixed_or_staged.DOMAINS)


def test_an_answer_is_right_by_its_own_table_only():
  first, second = mixed_or_staged.DOMAINS
  task = first.task("train", 0)
  truth = first.truth(task)
  assert len(first.rewards(task, truth)) == 1
  assert not first.rewards(task, (truth + 1) % substitution.ALPHABET)
  assert not second.rewards(task, truth)
  prompts = [domain.prompt(task) for domain in (first, second)]
  assert (prompts[0] != prompts[1]).tolist() == [True] + [False] * 4


def test_replies_are_of_exactly_as_many_steps_ago(school, tmp_path):
  pupil = school.pupil(0, steps=58)
  config = cispo_grpo.LOSSES["GRPO-clip"]
  curve = school.learn(pupil, config, seed=0, steps=4, lag=2, every=4)
  folder = runs.kept(tmp_path, lambda: curve)
  assert arms.read(folder, "lag/max") == ([1, 2, 3, 4], [0, 1, 2, 2])
  # On policy the ratio is 1: what samples and what trains are one policy.
  assert curve[1][1]["ratio/std"] < 1e-3 < curve[4][1]["ratio/std"]
  assert [step for step, values in curve if "eval/table0" in values] == [0, 4]
  # It has learned from the replies that it was shown.
  assert curve[0][1]["eval/table0"] > 0.01
  # The weights it began with are untouched.
  assert school.evaluate(pupil) == curve[0][1]
  # A run that is there is not repeated.
  assert runs.kept(tmp_path, pytest.fail) == tmp_path


def test_stages_give_each_domain_the_tasks_that_the_mix_does():
  domains = {domain.name: domain for domain in mixed_or_staged.DOMAINS}
  even = dict.fromkeys(domains, 1.0)
  size, stage = school_lib.GROUPS, mixed_or_staged.STAGE
  drawn = {}
  for arm, courses in mixed_or_staged.ARMS.items():
    tasks = mixture.TaskMixture(domains, even, "train", 0, courses, size)
    drawn[arm] = np.array(
      [
        tasks.task(n).domain == mixed_or_staged.FIRST
        for n in range(2 * stage * size)
      ]
    )
  assert drawn["staged"].sum() == drawn["mixed"].sum() == stage * size
  assert drawn["staged"][: stage * size].all()
  assert (drawn["mixed"].reshape(-1, size).sum(1) == size // 2).all()


def test_what_is_told_of_a_run():
  assert mixed_or_staged.forgotten([0.2, 0.9, 0.6]) == pytest.approx(0.3)
  assert bad_habits.halved([0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1]) == 4
  assert bad_habits.halved([0.4] * 9) is None
  assert bad_habits.fall([0.4, 0.2, 0.1, 0.05]) == pytest.approx(np.log(2))
  assert bad_habits.fall([0.005, 0.0]) == pytest.approx(np.log(2))
  assert bad_habits.early_and_late([3, 3, 3, 9, 6, 6, 6]) == (3, 6)
