import collections
import dataclasses
import json

import pytest

from forge_jax import errors, types
from forge_jax.observe import names
from forge_jax.tasks import curriculum, mixture


@dataclasses.dataclass
class Counting:
  """A domain whose tasks are their own indices."""

  name: str
  max_tokens: int = 8

  def task(self, split, index):
    return types.Task(f"{self.name}/{split}/{index}", self.name, index, {})

  def environment(self, task):
    return (self.name, task.index)


@dataclasses.dataclass
class Graded(Counting):
  """One whose tasks say how hard they are."""

  level: int = 0

  def at(self, level):
    if level > 3:
      raise errors.ConfigError(f"{self.name} has no level {level}")
    return dataclasses.replace(self, level=level)

  def task(self, split, index):
    task = super().task(split, index)
    return dataclasses.replace(task, payload={"hardness": self.level})

  def environment(self, task):
    return (self.name, task.index, self.level)


def mixed(weights, seed=0, split="train", make=Counting, **more):
  domains = {name: make(name) for name in weights}
  return mixture.TaskMixture(domains, weights, split, seed, **more)


def test_weights_hold_in_every_window():
  tasks = mixed({"a": 3.0, "b": 1.0})
  for window in range(4):
    names = [tasks.task(64 * window + i).domain for i in range(64)]
    assert collections.Counter(names) == {"a": 48, "b": 16}


def test_every_domain_is_read_in_full_and_once():
  tasks = [mixed({"a": 2.0, "b": 1.0}).task(i) for i in range(192)]
  for name, count in (("a", 128), ("b", 64)):
    indices = [t.index for t in tasks if t.domain == name]
    assert sorted(indices) == list(range(count))


def test_the_sequence_is_a_function_of_the_seed():
  def ids(seed):
    return [mixed({"a": 1.0, "b": 1.0}, seed).task(i).id for i in range(100)]

  assert ids(1) == ids(1)
  assert ids(1) != ids(2)


def test_a_single_domain_keeps_its_order():
  tasks = mixed({"a": 0.5}, split="heldout")
  assert tasks.task(17).id == "a/heldout/17"
  assert tasks.task(10**6).index == 10**6


def test_environments_come_from_the_task_s_domain():
  tasks = mixed({"a": 1.0, "b": 1.0})
  task = tasks.task(5)
  assert tasks.environment(task) == (task.domain, task.index)
  assert tasks.max_tokens(task) == 8


@pytest.mark.parametrize(
  ("domains", "weights", "message"),
  [
    ({}, {}, "at least one"),
    ({"a": Counting("a")}, {"a": 1.0, "b": 1.0}, "differ"),
    ({"a": Counting("a")}, {"b": 1.0}, r"\['a'\].*\['b'\]"),
    ({"a": Counting("a")}, {"a": 0.0}, "'a' has weight 0"),
    ({"a": Counting("b")}, {"a": 1.0}, "'b' is listed as 'a'"),
  ],
)
def test_a_mixture_that_cannot_work(domains, weights, message):
  with pytest.raises(errors.ConfigError, match=message):
    mixture.TaskMixture(domains, weights, "train", 0)


def test_a_negative_index_is_refused():
  with pytest.raises(errors.ConfigError, match="-1"):
    mixed({"a": 1.0}).task(-1)


def test_every_step_is_mixed():
  tasks = mixed({"a": 2.0, "b": 1.0, "c": 1.0}, tasks_per_step=8)
  for step in range(20):
    names = [tasks.task(8 * step + i).domain for i in range(8)]
    assert collections.Counter(names) == {"a": 4, "b": 2, "c": 2}


def test_uneven_weights_are_made_up_for():
  weights = {"a": 0.515, "b": 0.483, "c": 0.002}
  tasks = mixed(weights)
  count = 64 * 50
  names = collections.Counter(tasks.task(i).domain for i in range(count))
  for name, weight in weights.items():
    assert abs(names[name] - weight * count) <= 1


def test_the_sequence_does_not_depend_on_the_order_of_asking():
  weights = {"a": 2.0, "b": 1.0}
  forward = [mixed(weights).task(i).id for i in range(200)]
  other = mixed(weights)
  assert [other.task(i).id for i in reversed(range(200))] == forward[::-1]


def test_a_grain_iterator_goes_on_from_its_state():
  def iterator():
    return iter(mixed({"a": 1.0, "b": 2.0}).dataset.to_iter_dataset())

  first = iterator()
  for _ in range(70):
    next(first)
  state = first.get_state()
  ahead = [next(first).id for _ in range(30)]
  second = iterator()
  second.set_state(state)
  assert [next(second).id for _ in range(30)] == ahead
  assert ahead == [
    mixed({"a": 1.0, "b": 2.0}).task(i).id for i in range(70, 100)
  ]


def test_shares_follow_their_schedule():
  courses = {"b": curriculum.CourseConfig(weight=((0, 0.0), (100, 3.0)))}
  tasks = mixed({"a": 1.0, "b": 1.0}, courses=courses, tasks_per_step=16)

  def share(window):
    numbers = range(64 * window, 64 * window + 64)
    return sum(tasks.task(i).domain == "b" for i in numbers) / 64

  # These 64 are four steps from 4 * window on; b's weight is 3% of the step.
  assert {tasks.task(i).domain for i in range(16)} == {"a"}
  assert share(5) == pytest.approx(0.645 / 1.645, abs=0.02)
  assert share(12) == pytest.approx(1.485 / 2.485, abs=0.02)
  assert share(25) == share(100) == 0.75


def test_levels_and_lengths_follow_their_schedule():
  course = curriculum.CourseConfig(
    level=((0, 0), (2, 1), (4, 3)), max_tokens=((0, 100), (4, 200))
  )
  tasks = mixed(
    {"a": 1.0}, make=Graded, courses={"a": course}, tasks_per_step=4
  )
  made = [tasks.task(4 * step) for step in range(6)]
  assert [t.level for t in made] == [0, 0, 1, 1, 3, 3]
  assert [t.payload["hardness"] for t in made] == [0, 0, 1, 1, 3, 3]
  assert [tasks.max_tokens(t) for t in made] == [100, 125, 150, 175, 200, 200]
  assert tasks.environment(made[4]) == ("a", 16, 3)
  assert tasks.metrics() == {f"{names.DOMAIN_LEVEL}/a": 3.0}


def rising(**course):
  made = {"raise_at": 0.8, "raise_steps": 2} | course
  return mixed(
    {"a": 1.0, "b": 1.0},
    make=Graded,
    courses={"a": curriculum.CourseConfig(**made)},
    tasks_per_step=4,
  )


def levels(tasks, numbers):
  return {t.level for i in numbers if (t := tasks.task(i)).domain == "a"}


def observed(tasks, step, success):
  tasks.observe(step, {f"{names.DOMAIN_SUCCESS}/a": success})


def test_success_raises_the_level_of_what_was_not_asked_for_yet():
  tasks = rising()
  assert levels(tasks, range(20)) == {0}
  observed(tasks, 1, 0.7)
  observed(tasks, 2, 0.8)
  assert levels(tasks, range(20, 24)) == {0}
  tasks.observe(3, {f"{names.DOMAIN_SUCCESS}/b": 0.0})  # of another domain
  observed(tasks, 3, 0.9)
  assert levels(tasks, range(24)) == {0}
  assert levels(tasks, range(24, 40)) == {1}
  for step in (4, 5, 6, 7):  # tasks up to 24 were of level 0: step 6
    observed(tasks, step, 1.0)
  assert levels(tasks, range(40, 60)) == {1}
  observed(tasks, 8, 1.0)
  observed(tasks, 9, 1.0)
  assert levels(tasks, range(60, 80)) == {2}
  assert levels(tasks, range(24)) == {0}
  assert {tasks.task(i).level for i in range(80)} == {0, 1, 2, None}


def test_raises_have_an_end():
  tasks = rising(raise_most=1)
  for step in range(1, 50):
    levels(tasks, range(4 * step, 4 * step + 4))
    observed(tasks, step, 1.0)
  assert levels(tasks, range(200, 300)) == {1}


def test_a_restart_goes_on_at_the_same_levels():
  tasks = rising()
  levels(tasks, range(20))
  for step in (1, 2, 9):
    observed(tasks, step, 1.0)
  state = json.loads(json.dumps(tasks.state()))
  again = rising()
  again.restore(state)
  observed(tasks, 10, 1.0)
  observed(again, 10, 1.0)
  assert again.state() == tasks.state()
  for i in range(100):
    assert again.task(i) == tasks.task(i)


@pytest.mark.parametrize(
  ("course", "message"),
  [
    ({"weight": ((1, 1.0), (1, 2.0))}, "weight .* ascending"),
    ({"level": ((0, -1),)}, "level .* at least 0"),
    ({"max_tokens": (5,)}, "max_tokens .* pairs"),
    ({"raise_at": 2.0}, "raise_at is 2.0"),
    ({"raise_steps": 0}, "raise_steps 0"),
  ],
)
def test_a_course_that_cannot_work(course, message):
  with pytest.raises(errors.ConfigError, match=message):
    curriculum.CourseConfig(**course)


def test_a_level_needs_a_domain_that_has_some():
  course = curriculum.CourseConfig(level=((0, 1),))
  with pytest.raises(errors.ConfigError, match="'a', which has none"):
    mixed({"a": 1.0}, courses={"a": course})
  with pytest.raises(errors.ConfigError, match=r"courses \['b'\] differ"):
    mixed({"a": 1.0}, courses={"b": course})
  high = curriculum.CourseConfig(level=((0, 9),))
  with pytest.raises(errors.ConfigError, match="a has no level 9"):
    mixed({"a": 1.0}, make=Graded, courses={"a": high}).task(0)


def test_some_weight_must_be_left():
  course = curriculum.CourseConfig(weight=((0, 1.0), (10, 0.0)))
  tasks = mixed({"a": 1.0}, courses={"a": course})
  assert tasks.task(0).domain == "a"
  with pytest.raises(errors.ConfigError, match="all 0 at task 64"):
    tasks.task(64)
