"""Curricula: how shares, difficulty and length of domains change over a run.

Invariants:
  1. What holds for task number n is a function of the configuration, n, and the
     list of raises before n, which only grows.
  2. A raise holds from a number on that nobody has asked for yet, so that no
     task changes once it was given out.
  3. `state` is all that a restart needs: the same tasks come, at the same
     levels.

A step here is that at which a task is trained if all is in order: its number
over the tasks of a step.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import statistics
from typing import Any

from forge_jax import errors
from forge_jax.observe import names

# (step, value) pairs, steps ascending.
Knots = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CourseConfig:
  """How one domain changes; what is empty does not."""

  weight: Knots = ()  # share, linear between the steps given
  level: Knots = ()  # difficulty, from each step given on
  max_tokens: Knots = ()  # of a completion, linear between the steps given
  # Difficulty by measured success: the level rises by one when the mean success
  # of the last `raise_steps` steps with tasks of this level reaches `raise_at`.
  raise_at: float = 0.0  # 0: never
  raise_steps: int = 5
  raise_most: int = 4  # raises of a run

  def __post_init__(self):
    for name in ("weight", "level", "max_tokens"):
      knots = getattr(self, name)
      try:
        steps = [step for step, _ in knots]
        smallest = min((value for _, value in knots), default=0)
      except (TypeError, ValueError) as error:
        raise errors.ConfigError(
          f"curriculum {name} is {knots!r}; expected (step, value) pairs"
        ) from error
      if any(b <= a for a, b in itertools.pairwise(steps)) or smallest < 0:
        raise errors.ConfigError(
          f"curriculum {name} is {knots!r}; expected ascending steps and values "
          "of at least 0"
        )
    if not 0 <= self.raise_at <= 1 or self.raise_steps < 1:
      raise errors.ConfigError(
        f"curriculum raise_at is {self.raise_at} and raise_steps "
        f"{self.raise_steps}; expected 0 to 1, and at least 1"
      )


class Curriculum:
  """The courses of a run's domains.

  Tasks are asked for on one thread and success is reported on another; the
  number of a raise may then depend on how far ahead the first one is.
  """

  def __init__(self, courses: Mapping[str, CourseConfig], tasks_per_step: int):
    """Takes each domain's course, and how many tasks a step trains."""
    self._courses = dict(courses)
    self._tasks_per_step = tasks_per_step
    self._asked = 0  # one more than the largest number asked for
    self._raises: list[tuple[int, str]] = []  # from which number on; of which
    self._recent: dict[str, list[float]] = {name: [] for name in courses}

  def step(self, number: int) -> float:
    """At which step a task is trained."""
    return number / self._tasks_per_step

  def weight(self, name: str, number: int, constant: float) -> float:
    """A domain's share of the tasks around a number, not normalised."""
    knots = self._courses[name].weight
    return _linear(knots, self.step(number)) if knots else constant

  def level(self, name: str, number: int) -> int | None:
    """The difficulty of a task; None: the domain's own."""
    self._asked = max(self._asked, number + 1)
    course = self._courses[name]
    raises = sum(
      first <= number and domain == name for first, domain in self._raises
    )
    if not course.level and not course.raise_at:
      return None
    step = self.step(number)
    reached = [level for start, level in course.level if start <= step]
    return int(reached[-1] if reached else 0) + raises

  def max_tokens(self, name: str, number: int) -> int | None:
    """Most new tokens of a completion of a task; None: the domain's own."""
    knots = self._courses[name].max_tokens
    return round(_linear(knots, self.step(number))) if knots else None

  def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes in a trainer step's metrics, and raises levels that are due."""
    for name, course in self._courses.items():
      success = metrics.get(f"{names.DOMAIN_SUCCESS}/{name}")
      raised = [first for first, domain in self._raises if domain == name]
      if not course.raise_at or success is None:
        continue
      if raised and step <= self.step(raised[-1]) + 1:
        continue  # these tasks are still of the level before
      recent = self._recent[name]
      recent.append(float(success))
      del recent[: -course.raise_steps]
      if (
        len(recent) == course.raise_steps
        and statistics.fmean(recent) >= course.raise_at
        and len(raised) < course.raise_most
      ):
        self._raises.append((self._asked, name))
        recent.clear()

  def metrics(self) -> Mapping[str, float]:
    """The level of the tasks that are drawn now, by domain."""
    last = max(self._asked - 1, 0)
    levels = {name: self.level(name, last) for name in self._courses}
    return {
      f"{names.DOMAIN_LEVEL}/{name}": float(level)
      for name, level in levels.items()
      if level is not None
    }

  def state(self) -> dict[str, Any]:
    """What a restart needs, as JSON."""
    return {
      "asked": self._asked,
      "raises": [list(one) for one in self._raises],
      "recent": {name: list(values) for name, values in self._recent.items()},
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """The inverse of `state`."""
    self._asked = state["asked"]
    self._raises = [(number, name) for number, name in state["raises"]]
    self._recent |= {n: list(values) for n, values in state["recent"].items()}


def _linear(knots: Sequence[tuple[float, float]], step: float) -> float:
  """The value at a step; constant before the first knot and after the last."""
  if step <= knots[0][0]:
    return knots[0][1]
  for (start, low), (end, high) in itertools.pairwise(knots):
    if step < end:
      return low + (high - low) * (step - start) / (end - start)
  return knots[-1][1]
