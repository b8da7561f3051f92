"""Mixes domains into one endless sequence of tasks, a Grain dataset.

Task number i is a pure function of (domains, weights, split, seed, i) and of the
curriculum's state, so a run that continues needs nothing but its index and that
state. Every window of tasks, a step's worth, holds the domains in proportion to
their weights at its start, what is left over by rounding being made up for in
later windows; within a window the seed decides the order. A single domain keeps
its own order.
"""

from collections.abc import Mapping
import dataclasses
import functools
import random
from typing import Any, SupportsIndex

import grain

from forge_jax import errors, types
from forge_jax.tasks import base, curriculum

_ENDLESS = 2**31  # tasks until the sequence repeats
_WINDOW = 64  # tasks of a window, where nobody says what a step is


class TaskMixture:
  """An index-addressable sequence of the tasks of several domains."""

  def __init__(
    self,
    domains: Mapping[str, base.Domain],
    weights: Mapping[str, float],
    split: str,
    seed: int,
    courses: Mapping[str, curriculum.CourseConfig] | None = None,
    tasks_per_step: int = 1,
  ):
    """Mixes `split` of the domains.

    Args:
      domains: by name; the name of each is its key.
      weights: positive share of each domain, not necessarily normalised.
      split: the split to draw from; every domain must have it.
      seed: of the order of domains within a window.
      courses: how domains change over the run, of those that do.
      tasks_per_step: tasks that a trainer step consumes: a window, and what steps
        are told by; 1: windows are of another size.

    Raises:
      ConfigError: a domain has no weight, a weight no domain, a weight is not
        positive, a key is not the domain's name, there is no domain, or a
        course is of no domain or changes the level of one that has none.
    """
    courses = courses or {}
    _check(domains, weights, courses)
    self._domains = dict(domains)
    self._weights = {name: weights[name] for name in sorted(domains)}
    self._seed = seed
    self._window = tasks_per_step if tasks_per_step > 1 else _WINDOW
    self._split = split
    everything = {
      name: courses.get(name, curriculum.CourseConfig()) for name in domains
    }
    self._curriculum = curriculum.Curriculum(everything, tasks_per_step)
    self._at = functools.cache(self._at_level)
    # By window: how many tasks of each domain come before it, and the part of a
    # task that rounding owes each.
    self._before = [dict.fromkeys(self._weights, 0)]
    self._owed = dict.fromkeys(self._weights, 0.0)
    self.dataset = grain.MapDataset.source(_Numbers()).map(self._make)

  def task(self, index: int) -> types.Task:
    """The index-th task of the mixture.

    Raises:
      ConfigError: the index is negative, the domain lacks the split, or its
        curriculum asks for a level that it lacks.
    """
    if index < 0:
      raise errors.ConfigError(f"a task's index is >= 0, not {index}")
    return self.dataset[index]

  def environment(self, task: types.Task) -> base.Environment:
    """A fresh environment for one episode of the task."""
    return self._at(task.domain, task.level).environment(task)

  def max_tokens(self, task: types.Task) -> int:
    """Most new tokens of one completion in the task's domain."""
    if task.max_tokens is not None:
      return task.max_tokens
    return self._domains[task.domain].max_tokens

  def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Lets the curriculum see what a trainer step measured."""
    self._curriculum.observe(step, metrics)

  def metrics(self) -> Mapping[str, float]:
    """The curriculum's figures."""
    return self._curriculum.metrics()

  def state(self) -> dict[str, Any]:
    """What a restart needs beside the next index, as JSON."""
    return self._curriculum.state()

  def restore(self, state: Mapping[str, Any]) -> None:
    """The inverse of `state`."""
    self._curriculum.restore(state)

  def _make(self, number: int) -> types.Task:
    name, index = self._place(number)
    level = self._curriculum.level(name, number)
    task = self._at(name, level).task(self._split, index)
    return dataclasses.replace(
      task, level=level, max_tokens=self._curriculum.max_tokens(name, number)
    )

  def _at_level(self, name: str, level: int | None) -> base.Domain:
    domain = self._domains[name]
    return domain if level is None else domain.at(level)

  def _place(self, number: int) -> tuple[str, int]:
    """The domain of a task, and its place in the domain's sequence."""
    window, place = divmod(number, self._window)
    while len(self._before) <= window + 1:
      self._add_window()
    before, after = self._before[window : window + 2]
    order = [n for n in before for _ in range(after[n] - before[n])]
    random.Random(f"{self._seed} {window}").shuffle(order)
    name = order[place]
    return name, before[name] + order[:place].count(name)

  def _add_window(self) -> None:
    """Gives out one more window."""
    before = self._before[-1]
    number = (len(self._before) - 1) * self._window
    weights = {
      name: self._curriculum.weight(name, number, constant)
      for name, constant in self._weights.items()
    }
    total = sum(weights.values())
    if not total > 0:
      raise errors.ConfigError(
        f"the curriculum's weights are all 0 at task {number}"
      )
    for name, weight in weights.items():
      self._owed[name] += self._window * weight / total
    after = dict(before)
    for _ in range(self._window):  # each to whom most is owed
      name = max(self._owed, key=self._owed.__getitem__)
      after[name] += 1
      self._owed[name] -= 1
    self._before.append(after)


class _Numbers:
  """The tasks' numbers, as a Grain data source."""

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: SupportsIndex) -> int:
    return int(index)


def _check(
  domains: Mapping[str, base.Domain],
  weights: Mapping[str, float],
  courses: Mapping[str, curriculum.CourseConfig],
) -> None:
  if not domains:
    raise errors.ConfigError("a mixture needs at least one domain")
  if set(domains) != set(weights) or set(courses) - set(domains):
    raise errors.ConfigError(
      f"domains {sorted(domains)}, weights {sorted(weights)} and courses "
      f"{sorted(courses)} differ"
    )
  for name, domain in domains.items():
    if domain.name != name:
      raise errors.ConfigError(f"domain {domain.name!r} is listed as {name!r}")
    if not weights[name] > 0:
      raise errors.ConfigError(
        f"domain {name!r} has weight {weights[name]}; it must be positive"
      )
    course = courses.get(name)
    if course is None or isinstance(domain, base.Graded):
      continue
    if course.level or course.raise_at:
      raise errors.ConfigError(
        f"the curriculum changes the level of {name!r}, which has none"
      )
