"""Filters: the hooks of the curation that may refuse a group."""

from collections.abc import Callable, Mapping, Sequence
import hashlib
from typing import ClassVar

import numpy as np

from forge_jax import types
from forge_jax.observe import names
from forge_jax.pool import curation


class _Filter:
  filters: ClassVar[bool] = True
  waits: ClassVar[bool] = False


class ZeroVariance(_Filter):
  """Refuses groups that have no gradient: all their advantages are 0.

  Source: DAPO (arXiv 2503.14476), dynamic sampling.
  """

  metric = names.CURATION_ZERO_VARIANCE

  def __init__(self, trains: Callable[[types.Group], bool]):
    """`trains` says whether a group has an advantage other than 0."""
    self._trains = trains

  def examine(
    self, group: types.Group, moment: curation.Moment
  ) -> types.Group | None:
    return group if self._trains(group) else None


class Length(_Filter):
  """Refuses groups whose episodes sample too little or too much on average."""

  metric = names.CURATION_LENGTH

  def __init__(self, least: int, most: int):
    """Bounds on response tokens an episode; 0: none."""
    self._least, self._most = least, most

  def examine(
    self, group: types.Group, moment: curation.Moment
  ) -> types.Group | None:
    mean = sum(map(response_tokens, group.episodes)) / len(group.episodes)
    too_long = self._most and mean > self._most
    return None if mean < self._least or too_long else group


class Staleness(_Filter):
  """Refuses groups whose tokens were sampled too long ago on average."""

  metric = names.CURATION_STALENESS

  def __init__(self, most: float):
    """The largest mean age of the tokens, optimizer steps."""
    self._most = most

  def examine(
    self, group: types.Group, moment: curation.Moment
  ) -> types.Group | None:
    versions = [c.versions for e in group.episodes for c in e.completions]
    sampled = np.concatenate([*versions, np.empty(0, np.int32)])
    if len(sampled) and moment.step - sampled.mean() > self._most:
      return None
    return group


class Duplicates(_Filter):
  """Refuses groups that repeat one of the last trained."""

  metric = names.CURATION_DUPLICATES

  def __init__(self, by: str, horizon: int):
    """Compares "tokens" or "task" with the last `horizon` groups."""
    self._by = by
    self._horizon = horizon
    self._recent: dict[str, None] = {}  # keys, the oldest first

  def examine(
    self, group: types.Group, moment: curation.Moment
  ) -> types.Group | None:
    return None if self._key(group) in self._recent else group

  def remember(self, group: types.Group) -> None:
    """Notes a group that is trained."""
    key = self._key(group)
    self._recent.pop(key, None)
    self._recent[key] = None
    while len(self._recent) > self._horizon:
      del self._recent[next(iter(self._recent))]

  def state(self) -> list[str]:
    """The keys of the last trained groups, the oldest first."""
    return list(self._recent)

  def restore(self, state: Sequence[str]) -> None:
    """The inverse of `state`."""
    self._recent = dict.fromkeys(state)

  def _key(self, group: types.Group) -> str:
    if self._by == "task":
      return group.task.id
    digests = sorted(
      b"".join(
        hashlib.sha256(ids.tobytes()).digest()
        for completion in episode.completions
        for ids in (completion.prompt_ids, completion.response_ids)
      )
      for episode in group.episodes
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()


class Quotas(_Filter):
  """Refuses, for this batch, groups of a domain that has its share already."""

  metric = names.CURATION_QUOTAS
  waits: ClassVar[bool] = True

  def __init__(self, shares: Mapping[str, float]):
    """The largest share of a batch by domain; others have no bound."""
    self._shares = dict(shares)

  def examine(
    self, group: types.Group, moment: curation.Moment
  ) -> types.Group | None:
    domain = group.task.domain
    if domain not in self._shares:
      return group
    most = max(1, int(self._shares[domain] * moment.size))
    held = sum(other.task.domain == domain for other in moment.batch)
    return None if held >= most else group


def response_tokens(episode: types.Episode) -> int:
  """Tokens that were sampled in an episode."""
  return sum(len(c.response_ids) for c in episode.completions)
