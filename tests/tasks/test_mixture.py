import collections
import dataclasses

import pytest

from forge_jax import errors, types
from forge_jax.tasks import mixture


@dataclasses.dataclass
class Counting:
  """A domain whose tasks are their own indices."""

  name: str
  max_tokens: int = 8

  def task(self, split, index):
    return types.Task(f"{self.name}/{split}/{index}", self.name, index, {})

  def environment(self, task):
    return (self.name, task.index)


def mixed(weights, seed=0, split="train"):
  domains = {name: Counting(name) for name in weights}
  return mixture.TaskMixture(domains, weights, split, seed)


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
