"""Mixes domains into one endless sequence of tasks, a Grain pipeline.

Task number i is a pure function of (domains, weights, split, seed, i), so a run
that continues needs nothing but its index. Every window of tasks holds the
domains in proportion to their weights, so that each batch is mixed; within a
window the seed decides the order. A single domain keeps its own order.
"""

from collections.abc import Mapping
from typing import SupportsIndex

import grain

from forge_jax import errors, types
from forge_jax.tasks import base

_ENDLESS = 2**31  # tasks a domain is asked for before its sequence repeats
_WINDOW = 64  # tasks among which the order is shuffled


class TaskMixture:
  """An index-addressable sequence of the tasks of several domains."""

  def __init__(
    self,
    domains: Mapping[str, base.Domain],
    weights: Mapping[str, float],
    split: str,
    seed: int,
  ):
    """Mixes `split` of the domains.

    Args:
      domains: by name; the name of each is its key.
      weights: positive share of each domain, not necessarily normalised.
      split: the split to draw from; every domain must have it.
      seed: of the order of domains within a window.

    Raises:
      ConfigError: a domain has no weight, a weight no domain, a weight is not
        positive, a key is not the domain's name, or there is no domain.
    """
    _check(domains, weights)
    self._domains = dict(domains)
    names = sorted(domains)
    mixed = grain.MapDataset.mix(
      [grain.MapDataset.source(_Tasks(domains[n], split)) for n in names],
      [weights[n] for n in names],
    )
    if len(names) > 1:
      mixed = grain.experimental.WindowShuffleMapDataset(
        mixed, window_size=_WINDOW, seed=seed
      )
    self._tasks = mixed

  def task(self, index: int) -> types.Task:
    """The index-th task of the mixture.

    Raises:
      ConfigError: the index is negative, or the domain lacks the split.
    """
    if index < 0:
      raise errors.ConfigError(f"a task's index is >= 0, not {index}")
    return self._tasks[index]

  def environment(self, task: types.Task) -> base.Environment:
    """A fresh environment for one episode of the task."""
    return self._domains[task.domain].environment(task)

  def max_tokens(self, task: types.Task) -> int:
    """Most new tokens of one completion in the task's domain."""
    return self._domains[task.domain].max_tokens


class _Tasks:
  """A domain's split as a Grain data source."""

  def __init__(self, domain: base.Domain, split: str):
    self._domain = domain
    self._split = split

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: SupportsIndex) -> types.Task:
    return self._domain.task(self._split, int(index))

  def __repr__(self) -> str:
    return f"{self._domain.name}/{self._split}"


def _check(
  domains: Mapping[str, base.Domain], weights: Mapping[str, float]
) -> None:
  if not domains:
    raise errors.ConfigError("a mixture needs at least one domain")
  if set(domains) != set(weights):
    raise errors.ConfigError(
      f"domains {sorted(domains)} and weights {sorted(weights)} differ"
    )
  for name, domain in domains.items():
    if domain.name != name:
      raise errors.ConfigError(f"domain {domain.name!r} is listed as {name!r}")
    if not weights[name] > 0:
      raise errors.ConfigError(
        f"domain {name!r} has weight {weights[name]}; it must be positive"
      )
