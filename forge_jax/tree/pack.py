"""Packs samples into prefix trees of few static shapes, on the host.

1. Samples are checked, cut after the last token whose hidden state they need,
   and merged once (items.py, merge.py).
2. Which samples share a pack is planned from their sizes alone (plan.py).
3. Each pack is the part of the forest that its samples pass through: tokens
   keep their order, and an ancestor that an earlier pack has is replayed, so
   every token sees exactly what it saw in its sample.
4. A device batch takes the smallest of the config's shapes that holds all its
   packs.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from forge_jax import errors, types
from forge_jax.tree import cost as cost_lib
from forge_jax.tree import forest as forest_lib
from forge_jax.tree import items as items_lib
from forge_jax.tree import layout, plan


class Shape(NamedTuple):
  """What a pack of a device batch holds."""

  tokens: int  # T
  edges: int  # E
  rows: int  # M


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """The largest pack, and how many shapes are compiled for smaller ones."""

  tokens: int = 1024  # T
  edges: int = 1024  # E
  rows: int = 1024  # M
  packs: int = 1  # B; a multiple of the mesh's data axes
  block: int = 128  # tokens of an attention block
  buckets: int = 4  # most shapes of a device batch

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise errors.ConfigError(
          f"pack.{field.name}={getattr(self, field.name)} must be positive"
        )
    if self.tokens % self.block:
      raise errors.ConfigError(
        f"pack.block={self.block} does not divide pack.tokens={self.tokens}"
      )

  def shapes(self) -> list[Shape]:
    """The shapes of packs, at most `buckets`, from small to large."""
    blocks = self.tokens // self.block
    sizes = {-(-blocks * i // self.buckets) for i in range(1, self.buckets + 1)}
    return [
      Shape(
        size * self.block,
        -(-self.edges * size // blocks),
        -(-self.rows * size // blocks),
      )
      for size in sorted(sizes)
    ]


@dataclasses.dataclass(frozen=True)
class PackStats:
  """What packing did; tokens are those that need a hidden state.

  All fields add up over calls. A pair is a (query, key) that attention must
  compute, once per head and layer.
  """

  samples: int = 0  # that bear a loss
  request_tokens: int = 0  # of the samples one by one
  unique_tokens: int = 0  # of their forest, merged without limits
  packed_tokens: int = 0  # of the packs: with replayed ancestors
  padded_tokens: int = 0  # of the device batches: with padding
  request_pairs: int = 0  # tokens' names, for pairs
  unique_pairs: int = 0
  packed_pairs: int = 0
  executed_pairs: int = 0  # of all visible blocks, whole
  rows: int = 0  # loss-bearing tokens of the samples one by one
  unique_edges: int = 0  # tokens' names, for edges
  edges: int = 0  # of the packs
  padded_edges: int = 0  # with what fills the fullest pack's last block
  packs: int = 0  # not counting empty ones
  batches: int = 0
  pack_cost: float = 0.0  # FLOPs of the packs, without padding
  slowest_cost: float = 0.0  # if all of a device batch cost what its worst does

  @property
  def merge_ratio(self) -> float:
    """Request tokens per unique token: the saving that merging offers."""
    return self.request_tokens / max(self.unique_tokens, 1)

  @property
  def pair_ratio(self) -> float:
    """Request pairs per unique pair: the same for attention."""
    return self.request_pairs / max(self.unique_pairs, 1)

  @property
  def replay(self) -> float:
    """Share of the packs' tokens that another pack holds as well."""
    replayed = self.packed_tokens - self.unique_tokens
    return replayed / max(self.packed_tokens, 1)

  @property
  def fill(self) -> float:
    """Share of the device batches' tokens that is not padding."""
    return self.packed_tokens / max(self.padded_tokens, 1)

  @property
  def balance(self) -> float:
    """Mean cost of a device batch's packs over its highest; 1 is best."""
    return self.pack_cost / self.slowest_cost if self.slowest_cost else 1.0

  def flop_bound(self, cost: cost_lib.Cost) -> float:
    """FLOPs of the samples one by one / of the forest: the most to gain."""
    forest = self._forest_flops(cost)
    one_by_one = cost.total(self.request_tokens, self.request_pairs, self.rows)
    return one_by_one / forest if forest else 1.0

  def achieved(self, cost: cost_lib.Cost) -> float:
    """FLOPs of the forest / FLOPs executed: 1 without any overhead."""
    executed = cost.total(
      self.padded_tokens, self.executed_pairs, self.padded_edges
    )
    return self._forest_flops(cost) / executed if executed else 1.0

  def _forest_flops(self, cost: cost_lib.Cost) -> float:
    return cost.total(self.unique_tokens, self.unique_pairs, self.unique_edges)

  def __add__(self, other: "PackStats") -> "PackStats":
    """The figures of two calls together."""
    return PackStats(
      *(
        a + b
        for a, b in zip(
          dataclasses.astuple(self), dataclasses.astuple(other), strict=True
        )
      )
    )


def pack(
  samples: Sequence[types.Sample],
  config: PackConfig,
  *,
  vocab_size: int,
  cost: cost_lib.Cost = cost_lib.PER_TOKEN,
  share: bool = True,
) -> tuple[list[types.PackedBatch], PackStats]:
  """Packs samples; each loss-bearing token becomes a row exactly once.

  The result does not depend on the order of samples with distinct names.

  Args:
    samples: tokens of weight 0 bear no loss.
    config: the shapes of a batch.
    vocab_size: token ids must be below it.
    cost: what the packs of a device batch should have in equal parts.
    share: False packs each sample as a tree of its own: the plain packing that
      merging is compared with.

  Returns:
    Batches of exactly `config.packs` packs, and what was done. A pack is empty where another cut would not make the
    batch cheaper. Nothing bears a loss: no batches.

  Raises:
    SampleError: naming a sample that is malformed or fits no pack.
  """
  items = items_lib.collect(samples, vocab_size)
  _check_fits(items, config)
  if not items.names:
    return [], PackStats()
  forest = forest_lib.grow(items, share=share)
  shapes = config.shapes()
  groups = plan.batches(
    forest_lib.sizes(forest, cost), np.array(shapes), config.packs
  )
  batches, stats = [], _forest_stats(forest)
  for group in groups:
    parts = [forest_lib.part(forest, pack) for pack in group]
    batch = _batch(parts, config)
    stats += _batch_stats(parts, batch, config, cost)
    batches.append(batch)
  return batches, stats


def _check_fits(items: items_lib.Items, config: PackConfig) -> None:
  """Raises SampleError when not even a pack of its own holds an item."""
  count = items.count()
  needs = {
    "tokens": np.array([len(inputs) for inputs in items.inputs]),
    "edges": count,
    "rows": count,
  }
  for name, need in needs.items():
    limit = getattr(config, name)
    over = np.flatnonzero(need > limit)
    if len(over):
      raise errors.SampleError(
        f"sample {items.names[over[0]]} needs {need[over[0]]} {name}, but a "
        f"pack holds {limit}"
      )


def _batch(
  parts: Sequence[forest_lib.Part], config: PackConfig
) -> types.PackedBatch:
  """Pads packs to a device batch of the smallest shape that holds them."""
  needs = [(len(p.tokens), len(p.edge_token), len(p.row_edge)) for p in parts]
  need = np.array(needs).max(0)
  shape = next(s for s in config.shapes() if (need <= np.array(s)).all())

  def fill(arrays, size, dtype, value=0):
    out = np.full((config.packs, size), value, dtype)
    for row, array in zip(out, arrays, strict=False):
      row[: len(array)] = array
    return out

  end_BT = np.empty((config.packs, shape.tokens), np.int32)
  end_BT[:] = np.arange(1, shape.tokens + 1)
  for row, part in zip(end_BT, parts, strict=False):
    row[: len(part.tokens)] = part.subtree_end
  tokens, edges, rows = shape
  i32, f32 = np.int32, np.float32
  return types.PackedBatch(
    tokens_BT=fill([p.tokens for p in parts], tokens, i32),
    position_BT=fill([p.position for p in parts], tokens, i32),
    parent_BT=fill([p.parent for p in parts], tokens, i32, -1),
    samples_BT=fill([p.samples for p in parts], tokens, i32),
    layout=layout.build(end_BT, config.block),
    edge_parent_BE=fill([p.edge_parent for p in parts], edges, i32),
    edge_token_BE=fill([p.edge_token for p in parts], edges, i32, -1),
    row_edge_BM=fill([p.row_edge for p in parts], rows, i32),
    old_logprob_BM=fill([p.rows["old_logprob"] for p in parts], rows, f32),
    advantage_BM=fill([p.rows["advantage"] for p in parts], rows, f32),
    weight_BM=fill([p.rows["weight"] for p in parts], rows, f32),
    version_BM=fill([p.rows["version"] for p in parts], rows, i32, -1),
  )


def _forest_stats(forest: forest_lib.Forest) -> PackStats:
  """What does not depend on the packs."""
  length = forest.length
  return PackStats(
    samples=len(length),
    request_tokens=int(length.sum()),
    unique_tokens=len(forest.tree.tokens_T),
    request_pairs=int((length * (length + 1) // 2).sum()),
    unique_pairs=_pairs(forest.tree.position_T),
    rows=len(forest.row_edge),
    unique_edges=len(forest.edge_token),
  )


def _batch_stats(
  parts: Sequence[forest_lib.Part],
  batch: types.PackedBatch,
  config: PackConfig,
  cost: cost_lib.Cost,
) -> PackStats:
  """What a device batch adds."""
  tokens = [len(part.tokens) for part in parts]
  pairs = [_pairs(part.position) for part in parts]
  edges = [len(part.edge_token) for part in parts]
  costs = list(map(cost.total, tokens, pairs, edges))
  blocks = int(batch.layout.query_start[:, -1].sum())
  edge_blocks = -(-max(edges) // config.block)
  return PackStats(
    packed_tokens=sum(tokens),
    padded_tokens=batch.tokens_BT.size,
    packed_pairs=sum(pairs),
    executed_pairs=blocks * config.block**2,
    edges=sum(edges),
    padded_edges=config.packs * edge_blocks * config.block,
    packs=len(parts),
    batches=1,
    pack_cost=sum(costs),
    slowest_cost=config.packs * max(costs),
  )


def _pairs(position: np.ndarray) -> int:
  """Visible (query, key) pairs of tokens at these depths."""
  return int(position.sum(dtype=np.int64)) + len(position)
