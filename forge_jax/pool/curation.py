"""Curation: what happens to groups between the window and a batch.

A chain of hooks looks at every group that was taken from the window, in the
order of the chain. An *edit* may change the group (a later score, a mask). A
*filter* may refuse it: the group is dropped, the window moves on, and another
one fills its place in the batch; the tasks of groups dropped by the filters
named in `resubmit` are submitted again. Every group that a hook drops, edits
or makes wait is counted under the hook's name, which is a metric.

What is here decides; `GroupQueue` carries it out. Hooks run on the thread that
gathers batches. They remember nothing but what `state` holds, so that a restart
goes on where a checkpoint was.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, Protocol

from forge_jax import errors, types
from forge_jax.observe import names


@dataclasses.dataclass(frozen=True, slots=True)
class CurationConfig:
  """Which hooks there are. By default none changes or drops anything."""

  zero_variance: bool = False  # drop groups whose advantages are all 0
  min_tokens: int = 0  # drop groups with fewer response tokens an episode,
  max_tokens: int = 0  # or with more, on average; 0: no bound
  max_mean_lag: float = 0.0  # drop groups whose tokens are older, on average,
  # than this many optimizer steps; 0: no bound
  duplicates: str = "keep"  # or drop a group with the same "tokens" as, or of
  # the same "task" as, one of the last `duplicate_horizon` trained
  duplicate_horizon: int = 1024  # groups
  # Largest share of a batch by domain; what is over it waits for the next
  # batch, and is dropped if it is over it there.
  quotas: Mapping[str, float] = dataclasses.field(default_factory=dict)
  overlong: str = "keep"  # of an episode cut off for its length: "mask" its
  # tokens, "penalize" it by its length, or "drop" its group
  overlong_tokens: int = 0  # response tokens an episode: from margin below
  overlong_margin: int = 0  # this, where the penalty is 0, to this, where it
  # is 1
  rescore: bool = True  # apply scores given after the fact
  replay: float = 0.0  # share of each batch that was trained before
  replay_steps: int = 8  # groups of the last so many steps may come again
  resubmit: tuple[str, ...] = ()  # filters whose dropped tasks come again

  def __post_init__(self):
    _require_one_of("duplicates", self.duplicates, ("keep", "tokens", "task"))
    _require_one_of(
      "overlong", self.overlong, ("keep", "mask", "penalize", "drop")
    )
    for name in self.resubmit:
      _require_one_of("resubmit", name, FILTERS)
    for name in ("min_tokens", "max_tokens", "max_mean_lag", "overlong_margin"):
      if getattr(self, name) < 0:
        raise errors.ConfigError(
          f"curation {name} is {getattr(self, name)}; expected at least 0"
        )
    if 0 < self.max_tokens < self.min_tokens:
      raise errors.ConfigError(
        f"curation max_tokens is {self.max_tokens}, below min_tokens "
        f"{self.min_tokens}"
      )
    if not 0 <= self.replay < 1:
      raise errors.ConfigError(
        f"curation replay is {self.replay}; expected a share below 1"
      )
    for name in ("duplicate_horizon", "replay_steps"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"curation {name} is {getattr(self, name)}; expected at least 1"
        )
    for domain, share in self.quotas.items():
      if not 0 < share <= 1:
        raise errors.ConfigError(
          f"curation quota of {domain!r} is {share}; expected a share above 0"
        )
    if self.overlong == "penalize" and not (
      0 < self.overlong_margin <= self.overlong_tokens
    ):
      raise errors.ConfigError(
        "curation overlong='penalize' needs 0 < overlong_margin <= "
        f"overlong_tokens, not {self.overlong_margin} and "
        f"{self.overlong_tokens}"
      )

  def replayed(self, batch: int) -> int:
    """How many groups of a batch are replayed."""
    return round(self.replay * batch)


# The filters' names in `resubmit`, and their metrics.
FILTERS = {
  "zero_variance": names.CURATION_ZERO_VARIANCE,
  "length": names.CURATION_LENGTH,
  "staleness": names.CURATION_STALENESS,
  "duplicates": names.CURATION_DUPLICATES,
  "quotas": names.CURATION_QUOTAS,
  "overlong": names.CURATION_OVERLONG_DROPPED,
}


def _require_one_of(name: str, value: str, known: Iterable[str]) -> None:
  if value not in known:
    raise errors.ConfigError(
      f"curation {name} is {value!r}; expected one of {tuple(known)}"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
  """When a group is looked at."""

  step: int  # trained steps when it will be trained
  batch: Sequence[types.Group]  # those of its batch so far
  size: int  # of the batch, replayed groups left out


class Hook(Protocol):
  """One member of the chain."""

  metric: str  # counts the groups that it dropped or edited
  filters: bool  # whether it may refuse; else it edits
  waits: ClassVar[bool]  # whether what it refuses gets another chance

  def examine(self, group: types.Group, moment: Moment) -> types.Group | None:
    """The group, perhaps edited; None: it is refused."""

  # A filter with a memory has `remember(group)`, told of what is trained,
  # and `state()` and `restore(state)`, in JSON.


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
  """What the chain says about a group."""

  group: types.Group | None  # as it is trained; None: it is not
  waits: bool = False  # it may be trained in the next batch
  again: bool = False  # its task shall be submitted again


class Curation:
  """A chain of hooks and what it has done."""

  def __init__(self, hooks: Sequence[Hook] = (), resubmit: Sequence[str] = ()):
    """Takes over the hooks, in their order.

    Args:
      hooks: the chain.
      resubmit: names in FILTERS whose dropped tasks are submitted again.
    """
    self._hooks = tuple(hooks)
    self._remembering = [hook for hook in hooks if hasattr(hook, "remember")]
    self._again = {FILTERS[name] for name in resubmit}
    # Checkpoints keep the queue's counts beside those of the hooks.
    counted = (names.QUEUE_OVER_LAG, names.QUEUE_EXPIRED)
    self.counts: collections.Counter[str] = collections.Counter(
      dict.fromkeys([*counted, *(hook.metric for hook in hooks)], 0)
    )

  def examine(
    self, group: types.Group, moment: Moment, last_chance: bool = False
  ) -> Verdict:
    """Sends a group through the chain.

    Args:
      group: as it is stored.
      moment: when.
      last_chance: it waited for this batch already.
    """
    for hook in self._hooks:
      result = hook.examine(group, moment)
      if result is None:
        if hook.waits and not last_chance:
          self.counts[names.CURATION_WAITED] += 1
          return Verdict(None, waits=True)
        self.counts[hook.metric] += 1
        return Verdict(None, again=hook.metric in self._again)
      self.counts[hook.metric] += result is not group
      group = result
    self.remember([group])
    return Verdict(group)

  def edit(self, group: types.Group, moment: Moment) -> types.Group:
    """A group that is sure to be trained: the chain without its filters."""
    for hook in self._hooks:
      if not hook.filters:
        result = hook.examine(group, moment)
        self.counts[hook.metric] += result is not group
        group = result
    return group

  def remember(self, groups: Iterable[types.Group]) -> None:
    """Tells the filters that have a memory what is trained."""
    for hook in self._remembering:
      for group in groups:
        hook.remember(group)

  def state(self) -> dict[str, Any]:
    """The counts and what the filters remember, as JSON."""
    memory = {hook.metric: hook.state() for hook in self._remembering}
    return {"counts": dict(self.counts), "memory": memory}

  def restore(self, state: Mapping[str, Any]) -> None:
    """The inverse of `state`; hooks that it does not know start anew."""
    self.counts = collections.Counter(dict.fromkeys(self.counts, 0))
    self.counts.update(state["counts"])
    for hook in self._remembering:
      hook.restore(state["memory"].get(hook.metric, []))
