"""The host side of a trainer step: from a batch of groups to packs.

A pure function of the groups and the configuration, of NumPy only: it runs on
another thread while the device is at the step before.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import time

import numpy as np

from forge_jax import types
from forge_jax.observe import names
from forge_jax.trainer import credit, scores
from forge_jax.tree import collapse
from forge_jax.tree import cost as cost_lib
from forge_jax.tree import pack as pack_lib


@dataclasses.dataclass(frozen=True)
class StepBatch:
  """What one trainer step trains. Written by `Preparation`."""

  # Device batches of each update; none where every advantage is 0.
  updates: tuple[tuple[types.PackedBatch, ...], ...]
  credits: tuple[credit.CreditStats, ...]  # of each update
  versions: np.ndarray  # int32, of every sampled token
  packed: pack_lib.PackStats  # of all updates
  sharing: collapse.Sharing  # what merging could have saved
  seconds: float  # that it took

  def metrics(self, step: int, cost: cost_lib.Cost) -> dict[str, float]:
    """Figures of the batch when it is trained after `step` steps."""
    packed = self.packed
    episodes = np.array([c.episodes for c in self.credits])
    share = episodes / episodes.sum()
    # The one appended token of lag 0 keeps a batch without tokens defined.
    lag = step - np.append(self.versions, step)

    def mean(name: str) -> float:
      return float(np.dot(share, [getattr(c, name) for c in self.credits]))

    return {
      names.TRAIN_REWARD: mean("mean_reward"),
      names.TRAIN_SUCCESS: mean("success_rate"),
      names.TRAIN_SAMPLES: sum(c.samples for c in self.credits),
      names.TRAIN_RESPONSE_TOKENS: sum(c.response_tokens for c in self.credits),
      names.LAG_MEAN: float(lag.sum()) / max(len(lag) - 1, 1),
      names.LAG_MAX: int(lag.max()),
      names.TREE_REQUEST_TOKENS: packed.request_tokens,
      names.TREE_UNIQUE_TOKENS: packed.unique_tokens,
      names.TREE_MERGE_RATIO: packed.merge_ratio,
      names.TREE_POSSIBLE_RATIO: self.sharing.possible_ratio,
      names.TREE_COLLAPSED: float(self.sharing.collapsed),
      names.TREE_FLOP_BOUND: packed.flop_bound(cost),
      names.TREE_ACHIEVED: packed.achieved(cost),
      names.TREE_FILL: packed.fill,
      names.TREE_REPLAY: packed.replay,
      names.TREE_BATCHES: packed.batches,
      names.TIME_DATA: self.seconds,
      **scores.figures([s for c in self.credits for s in c.scores]),
    }


@dataclasses.dataclass(frozen=True)
class Preparation:
  """Credits, merges and packs a batch."""

  minibatches: int  # updates of a step
  credit: credit.CreditConfig
  pack: pack_lib.PackConfig
  vocab_size: int
  cost: cost_lib.Cost

  def __call__(self, groups: Sequence[types.Group]) -> StepBatch:
    """Prepares a batch, its groups in the order of their updates.

    Raises:
      SampleError: a group holds a malformed completion.
    """
    started = time.perf_counter()
    updates, credits, samples, packs = [], [], [], []
    for part in self._split(groups):
      found, stats = credit.assign_credit(part, self.credit)
      batches, packed = pack_lib.pack(
        found, self.pack, vocab_size=self.vocab_size, cost=self.cost
      )
      updates.append(tuple(batches))
      credits.append(stats)
      samples.append(found)
      packs.append(packed)
    packed = sum(packs[1:], packs[0])
    versions = [
      completion.versions
      for group in groups
      for episode in group.episodes
      for completion in episode.completions
    ]
    return StepBatch(
      updates=tuple(updates),
      credits=tuple(credits),
      versions=np.concatenate([*versions, np.empty(0, np.int32)]),
      packed=packed,
      sharing=collapse.examine(samples, packed.merge_ratio),
      seconds=time.perf_counter() - started,
    )

  def _split(
    self, groups: Sequence[types.Group]
  ) -> list[Sequence[types.Group]]:
    """The groups of each update: as many in each, but for one.

    A first step that replays nothing yet may have fewer groups than others.
    """
    count = min(self.minibatches, len(groups))
    ends = [len(groups) * i // count for i in range(count + 1)]
    return [groups[a:b] for a, b in itertools.pairwise(ends)]
