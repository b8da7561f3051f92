"""Arms of the tree benchmark: four ways to train a group, and the step.

  tree        the requests, merged into a prefix tree
  packed      the requests side by side, nothing shared
  trajectory  as packed, but requests that extend one another are one sample
  padded      one request a row, each row as long as the longest request

Every arm is packed by tree.pack and run by trainer.update.Updater.accumulate,
on one kernel, block, dtype and rematerialisation: only the data differ. A pack
of the tree holds the group's largest tree. Plain packs have the size that
wastes least on padding, since padding of theirs would flatter the tree.

FLOPs are exact: those of a forward and a backward pass over tokens, pairs and
edges, without padding, partly visible blocks or anything computed twice:

  token  6 x the weights of the layers' matrices (2 forward, 4 backward)
  pair   12 L H C (two products: 4 L H C forward, 8 L H C backward)
  edge   6 V D (LM head)

An arm of many batches is sampled: sorted by FLOPs and split in as many strata
as there are repeats, one random batch of each is timed, once, and stands for
its stratum in proportion to FLOPs (padded: to the count, its batches being of
one shape and so of nearly one cost). An arm of fewer batches is timed whole in
every repeat, and the median counts.
"""

from collections.abc import Sequence
import dataclasses
import time

from flax import nnx
import jax
import numpy as np

from forge_jax import types
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.trainer import update
from forge_jax.tree import cost as cost_lib
from forge_jax.tree import merge, pack


def model_cost(config: model_config.ModelConfig) -> cost_lib.Cost:
  """Exact FLOPs of a decoder; see the module's text."""
  heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  weights = config.num_layers * config.width * (heads + 3 * config.mlp_width)
  return cost_lib.Cost(
    token=6.0 * weights,
    pair=12.0 * config.num_layers * config.num_heads * config.head_dim,
    edge=6.0 * config.vocab_size * config.width,
  )


def batch_flops(batch: types.PackedBatch, cost: cost_lib.Cost) -> float:
  """Exact FLOPs of a device batch, padding apart.

  The last token of a pack bears an edge, since nothing after a sample's last
  loss-bearing token is kept; so the edges tell where padding begins.
  """
  total = 0.0
  for position_T, parent_E, token_E in zip(
    batch.position_BT, batch.edge_parent_BE, batch.edge_token_BE, strict=True
  ):
    parents = parent_E[token_E >= 0]
    tokens = int(parents.max(initial=-1)) + 1
    pairs = int((position_T[:tokens].astype(np.int64) + 1).sum())
    total += cost.total(tokens, pairs, len(parents))
  return total


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Batches timed together, and the stratum that they stand for."""

  batches: Sequence[types.PackedBatch]
  flops: float  # exact
  size: float  # what seconds are proportional to
  stratum: float  # the same of all that they stand for


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
  """A way to train a group; one part is timed in every repeat, or each in one."""

  parts: Sequence[Part]
  stats: pack.PackStats
  tokens: int  # of a pack
  batches: int  # in all
  host_seconds: float  # CPU, to merge, pack and lay out everything

  def part(self, repeat: int) -> Part:
    """What to time in a repeat."""
    return self.parts[repeat % len(self.parts)]

  def seconds(self, times: Sequence[float]) -> float:
    """Seconds of the whole arm, of the parts' in the order of repeats."""
    if len(self.parts) == 1:
      return float(np.median(times))
    return sum(
      part.stratum / part.size * seconds
      for part, seconds in zip(self.parts, times, strict=True)
    )

  def spread(self, times: Sequence[float]) -> float:
    """(Greatest - least) / median of the seconds per size."""
    rates = [t / self.part(i).size for i, t in enumerate(times)]
    return float(np.ptp(rates) / np.median(rates))

  @property
  def timed(self) -> str:
    """How many batches of how many are timed."""
    return f"{sum(len(p.batches) for p in self.parts)} of {self.batches}"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all arms of a run share."""

  cost: cost_lib.Cost
  vocab_size: int
  block: int
  repeats: int
  seed: int = 0  # of the random choice of batches
  tokens: int | None = None  # of every plain pack; None: what wastes least
  buckets: int = 4

  def build(
    self, requests: Sequence[types.Sample], histories: Sequence[types.Sample]
  ) -> dict[str, Arm]:
    """The arms of a group, by name.

    Args:
      requests: one sample each.
      histories: the same as trajectories; as many as requests where none
        extends another, and then the arm is left out, being "packed" again.
    """
    size = self._plain_size(requests)
    tree = max(size, _round_up(_largest_tree(requests), self.block))
    whole = tree == size  # nothing shared: compare all of it
    arms = {
      "tree": self._packed(requests, tree, share=True, whole=whole),
      "packed": self._packed(requests, size, share=False, whole=whole),
    }
    if len(histories) < len(requests):
      size = self._plain_size(histories)
      arms["trajectory"] = self._packed(histories, size, share=False)
    arms["padded"] = self._padded(requests)
    return arms

  def plain_batch(
    self, requests: Sequence[types.Sample], tokens: int
  ) -> types.PackedBatch:
    """A plainly packed batch of a size, to compare the memory."""
    return pack.pack(
      requests,
      self.config(tokens, 1),
      vocab_size=self.vocab_size,
      cost=self.cost,
      share=False,
    )[0][0]

  def config(self, tokens: int, buckets: int) -> pack.PackConfig:
    """One pack to a device batch; edges and rows never overflow first."""
    return pack.PackConfig(
      tokens=tokens,
      edges=tokens,
      rows=tokens,
      block=self.block,
      buckets=buckets,
    )

  def _plain_size(self, samples: Sequence[types.Sample]) -> int:
    """Tokens of a pack that leave the least padding, up to 3 samples' worth."""
    if self.tokens is not None:
      return self.tokens
    lengths = sorted((_length(s) for s in samples), reverse=True)
    least = _round_up(lengths[0], self.block)
    step = _round_up(-(-least // 8), self.block)
    sizes = range(least, 3 * least, step)
    return min(sizes, key=lambda size: size * _bins(lengths, size))

  def _packed(self, samples, tokens, *, share, whole=False) -> Arm:
    started = time.process_time()
    batches, stats = pack.pack(
      samples,
      self.config(tokens, self.buckets),
      vocab_size=self.vocab_size,
      cost=self.cost,
      share=share,
    )
    host_seconds = time.process_time() - started
    parts = self._parts(batches, whole=whole)
    return Arm(parts, stats, tokens, len(batches), host_seconds)

  def _padded(self, samples) -> Arm:
    tokens = _round_up(max(map(_length, samples)), self.block)
    config = self.config(tokens, 1)
    started = time.process_time()
    batches, stats = [], pack.PackStats()
    for sample in samples:
      alone, more = pack.pack(
        [sample],
        config,
        vocab_size=self.vocab_size,
        cost=self.cost,
        share=False,
      )
      batches, stats = batches + alone, stats + more
    host_seconds = time.process_time() - started
    parts = self._parts(batches, alike=True)
    return Arm(parts, stats, tokens, len(batches), host_seconds)

  def _parts(
    self,
    batches: Sequence[types.PackedBatch],
    *,
    whole: bool = False,
    alike: bool = False,
  ) -> list[Part]:
    """All batches as one part, or one random batch of each stratum."""
    flops = np.array([batch_flops(batch, self.cost) for batch in batches])
    sizes = np.ones(len(batches)) if alike else flops

    def part(chosen, stratum):
      return Part(
        [batches[i] for i in chosen],
        float(flops[chosen].sum()),
        float(sizes[chosen].sum()),
        float(sizes[stratum].sum()),
      )

    if whole or len(batches) < self.repeats:
      everything = np.arange(len(batches))
      return [part(everything, everything)]
    rng = np.random.default_rng(self.seed)
    order = np.argsort(flops, kind="stable")
    return [
      part(rng.choice(stratum, 1), stratum)
      for stratum in np.array_split(order, self.repeats)
    ]


def _round_up(tokens: int, block: int) -> int:
  return -(-tokens // block) * block


def _length(sample: types.Sample) -> int:
  """Tokens that need a hidden state, the last response token bearing a loss."""
  return len(sample.prompt_ids) + len(sample.response_ids) - 1


def _bins(lengths: Sequence[int], size: int) -> int:
  """Packs that first-fit makes of the lengths, longest first."""
  free = np.full(len(lengths), size)
  for length in lengths:
    free[np.argmax(free >= length)] -= length
  return np.count_nonzero(free < size)


def _largest_tree(samples: Sequence[types.Sample]) -> int:
  """Tokens of the largest tree of the samples' forest."""
  tree = merge.merge(
    [np.concatenate([s.prompt_ids, s.response_ids[:-1]]) for s in samples]
  )
  roots = np.flatnonzero(tree.parent_T < 0)
  return int((tree.subtree_end_T[roots] - roots).max())


class Stepper:
  """The product's step for one random model.

  Invariant: a batch is timed only after `compile` saw one of its shape.
  """

  def __init__(
    self,
    config: model_config.ModelConfig,
    block: int,
    *,
    remat: str = "elementwise",
  ):
    self._mesh = sharding.make_mesh(
      sharding.MeshConfig(), jax.local_devices()[:1]
    )
    self._updater = update.Updater(
      decoder_lib.Decoder(config, rngs=nnx.Rngs(params=0)),
      update.UpdateConfig(block=block, remat=remat),
      self._mesh,
    )
    self._state = self._updater.initial_state()

  @property
  def parameters(self) -> int:
    """Numbers in the model."""
    return sum(x.size for x in jax.tree.leaves(self._state.params))

  def compile(self, batch: types.PackedBatch) -> int:
    """Compiles the step for a shape; temporary bytes of the program."""
    gradient = self._updater.zero_gradient(self._state)
    batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
    compiled = self._updater.lower(self._state, gradient, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  def seconds(self, batches: Sequence[types.PackedBatch]) -> float:
    """CPU-seconds of the gradient of some device batches."""
    gradient = self._updater.zero_gradient(self._state)
    jax.block_until_ready(gradient)
    started = time.process_time()
    for batch in batches:
      gradient, _ = self._updater.accumulate(self._state, gradient, batch, 0)
    jax.block_until_ready(gradient)
    return time.process_time() - started
