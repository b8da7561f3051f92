"""Edits: the hooks of the curation that change what is trained of a group."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

from forge_jax import errors, types
from forge_jax.observe import names
from forge_jax.pool import curation, filters
from forge_jax.pool import store as store_lib


class _Edit:
  filters: ClassVar[bool] = False
  waits: ClassVar[bool] = False


class Overlong(_Edit):
  """Handles episodes that were cut off because they became too long.

  "mask": their tokens are not trained, their reward stays in the baseline.
  "penalize": a process reward "overlong" of 0 at `tokens - margin` response
  tokens, falling to -1 at `tokens` and beyond, whether cut off or not. "drop":
  the group is refused. Source: DAPO (arXiv 2503.14476), overlong reward
  shaping.
  """

  def __init__(self, how: str, tokens: int = 0, margin: int = 0):
    """See `CurationConfig.overlong`."""
    self._how, self._tokens, self._margin = how, tokens, margin
    self.filters = how == "drop"
    self.metric = (
      names.CURATION_OVERLONG_DROPPED
      if self.filters
      else names.CURATION_OVERLONG
    )

  def examine(
    self, group: types.Group, moment: curation.Moment
  ) -> types.Group | None:
    if self._how == "drop":
      return None if any(map(is_cut_off, group.episodes)) else group
    edit = self._mask if self._how == "mask" else self._penalize
    episodes = tuple(map(edit, group.episodes))
    if all(a is b for a, b in zip(episodes, group.episodes, strict=True)):
      return group
    return dataclasses.replace(group, episodes=episodes)

  def _mask(self, episode: types.Episode) -> types.Episode:
    if not is_cut_off(episode):
      return episode
    # A reward that names a completion moves to the episode as a whole.
    rewards = tuple(dataclasses.replace(r, step=None) for r in episode.rewards)
    return dataclasses.replace(episode, completions=(), rewards=rewards)

  def _penalize(self, episode: types.Episode) -> types.Episode:
    over = filters.response_tokens(episode) - self._tokens + self._margin
    if over <= 0:
      return episode
    penalty = types.Reward(
      "overlong", types.Component.PROCESS, -min(1.0, over / self._margin)
    )
    return dataclasses.replace(episode, rewards=(*episode.rewards, penalty))


def is_cut_off(episode: types.Episode) -> bool:
  """Whether its last completion ended for its length."""
  last = episode.completions[-1:]
  return any(c.stop_reason == types.StopReason.LENGTH for c in last)


class Rescore(_Edit):
  """Applies the scores that a person or a verifier gave after the fact.

  A score replaces the episode's reward with the same name and completion, or
  is added; of two scores the later one counts.
  """

  metric = names.CURATION_RESCORED

  def __init__(self, pool: store_lib.DataPool):
    """Reads the pool's notes, each once."""
    self._pool = pool
    self._next = 0  # number of the first note that was not read
    # By group and episode: rewards by (name, completion).
    self._scores: dict[int, dict[str, dict[tuple, types.Reward]]] = {}

  def examine(
    self, group: types.Group, moment: curation.Moment
  ) -> types.Group | None:
    self._read()
    if group.index not in self._scores:
      return group
    scores = self._scores[group.index]
    episodes = tuple(
      _rescored(e, scores[e.id]) if e.id in scores else e
      for e in group.episodes
    )
    return dataclasses.replace(group, episodes=episodes)

  def _read(self) -> None:
    for note in self._pool.notes(self._next):
      self._next = note.number + 1
      if "scores" not in note.record:
        continue  # said for other readers
      for episode, rewards in note.record["scores"].items():
        held = self._scores.setdefault(note.group, {}).setdefault(episode, {})
        for reward in map(_read_reward, rewards):
          held[reward.name, reward.step] = reward


def score(
  pool: store_lib.DataPool,
  group: int,
  rewards: Mapping[str, Sequence[types.Reward]],
) -> None:
  """Keeps scores for episodes of a group, durably.

  They count from the next batch that takes the group, replays included.

  Args:
    pool: where the group is, or will be.
    group: its index.
    rewards: new rewards by the episode's id.

  Raises:
    PoolError: they cannot be kept.
  """
  pool.annotate(
    group,
    {
      "scores": {
        episode: [[r.name, r.component.value, r.value, r.step] for r in new]
        for episode, new in rewards.items()
      }
    },
  )


def _read_reward(record: Sequence[Any]) -> types.Reward:
  try:
    name, component, value, step = record
    return types.Reward(name, types.Component(component), float(value), step)
  except (TypeError, ValueError) as error:
    raise errors.PoolError(
      f"a score in the pool is not [name, component, value, step]: {record!r}"
    ) from error


def _rescored(
  episode: types.Episode, scores: Mapping[tuple, types.Reward]
) -> types.Episode:
  kept = [r for r in episode.rewards if (r.name, r.step) not in scores]
  return dataclasses.replace(episode, rewards=(*kept, *scores.values()))
