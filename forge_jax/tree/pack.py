"""Packs samples into prefix trees of static shape, on the host.

1. A sample's last loss-bearing token and what follows it are read by no
   loss-bearing token, so they need no hidden state: they are cut off.
2. All samples are sorted once in depth-first order of their prefix forest.
3. A pack is a run of that order, closed when the tokens, edges or rows that
   the next sample adds would overflow. The next pack starts with that whole
   sample, so its ancestors are replayed exactly. For a given order, filling
   each pack greedily makes the fewest packs; packs are not balanced further,
   since all have one static shape and so nearly one cost.
4. Each run is merged; its rows and edges are laid out in that order.
"""

from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np

from forge_jax import errors, types
from forge_jax.tree import layout, merge


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """The static shape of a device batch: one shape, one compilation."""

  tokens: int = 1024  # T
  edges: int = 1024  # E
  rows: int = 1024  # M
  packs: int = 1  # B; a multiple of the mesh's data axes
  block: int = 128  # tokens of an attention block

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
  rows: int = 0
  edges: int = 0
  packs: int = 0  # not counting empty ones
  request_pairs: int = 0  # of the samples one by one
  packed_pairs: int = 0  # of the packs

  @property
  def merge_ratio(self) -> float:
    """Request tokens per packed token: the saving in linear work."""
    return self.request_tokens / max(self.packed_tokens, 1)

  @property
  def fill(self) -> float:
    """Share of the device batches' tokens that is not padding."""
    return self.packed_tokens / max(self.padded_tokens, 1)

  @property
  def pair_ratio(self) -> float:
    """Request pairs per packed pair: the saving in attention."""
    return self.request_pairs / max(self.packed_pairs, 1)

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


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Item:
  """A sample that bears a loss, cut before its last loss-bearing token."""

  sample: types.Sample
  sequence: np.ndarray  # int32 [P + R], whole
  depths: np.ndarray  # int [rows], depths of its loss-bearing tokens

  @property
  def inputs(self) -> np.ndarray:
    """The tokens whose hidden states are needed."""
    return self.sequence[: self.depths[-1]]


def pack(
  samples: Sequence[types.Sample], config: PackConfig, *, vocab_size: int
) -> tuple[list[types.PackedBatch], PackStats]:
  """Packs samples; each loss-bearing token becomes a row exactly once.

  The result does not depend on the order of samples with distinct names.

  Args:
    samples: tokens of weight 0 bear no loss.
    config: shape of a batch.
    vocab_size: token ids must be below it.

  Returns:
    Batches of exactly `config.packs` packs, the last ones empty where
    necessary, and what was done. Nothing bears a loss: no batches.

  Raises:
    SampleError: naming a sample that is malformed or fits no pack.
  """
  items = []
  for sample in samples:
    _check(sample, vocab_size)
    item = _item(sample)
    if len(item.depths):
      _check_fits(item, config)
      items.append(item)
  items.sort(
    key=lambda item: (
      merge.sort_key(item.inputs),
      item.sample.name,
    )
  )
  inputs = [np.empty(0, np.int32), *(item.inputs for item in items)]
  shared = [merge.common_prefix(*pair) for pair in itertools.pairwise(inputs)]
  packs = [_lay_out(run, config) for run in _runs(items, shared, config)]
  stats = _stats(items, shared, packs, config)
  size = config.packs
  groups = [packs[i : i + size] for i in range(0, len(packs), size)]
  return [_batch(group, config) for group in groups], stats


def _item(sample: types.Sample) -> _Item:
  sequence = np.concatenate([sample.prompt_ids, sample.response_ids])
  depths = len(sample.prompt_ids) + np.flatnonzero(sample.weights)
  if len(depths) and depths[0] == 0:
    raise errors.SampleError(
      f"sample {sample.name}: its first token bears a loss but the prompt is "
      "empty, so no hidden state predicts it"
    )
  return _Item(sample, sequence.astype(np.int32), depths)


def _check(sample: types.Sample, vocab_size: int) -> None:
  """Raises SampleError unless the sample is well-formed."""
  shape = (len(sample.response_ids),)
  for name in ("logprobs", "advantages", "weights", "versions"):
    array = getattr(sample, name)
    if array.shape != shape:
      raise errors.SampleError(
        f"sample {sample.name}: {name} has shape {array.shape}, but "
        f"{shape[0]} response tokens"
      )
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
      raise errors.SampleError(
        f"sample {sample.name}: {name}[{bad[0]}] is {array[bad[0]]}"
      )
  for name in ("prompt_ids", "response_ids"):
    array = getattr(sample, name)
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(bad):
      raise errors.SampleError(
        f"sample {sample.name}: {name}[{bad[0]}] is {array[bad[0]]}, outside "
        f"the vocabulary of {vocab_size}"
      )


def _check_fits(item: _Item, config: PackConfig) -> None:
  """Raises SampleError when not even a pack of its own holds the item."""
  needs = {
    "tokens": len(item.inputs),
    "edges": len(item.depths),
    "rows": len(item.depths),
  }
  for name, need in needs.items():
    limit = getattr(config, name)
    if need > limit:
      raise errors.SampleError(
        f"sample {item.sample.name} needs {need} {name}, but a pack holds "
        f"{limit}"
      )


def _runs(
  items: Sequence[_Item], shared: Sequence[int], config: PackConfig
) -> list[list[_Item]]:
  """Cuts the sorted items into runs that fit a pack each.

  Edges are bounded from above: the token after an item's inputs is counted
  as an edge of its own, though another item may have the same.
  """
  runs = []
  limits = np.array([config.tokens, config.edges, config.rows])
  used = limits  # so that the first item opens a run
  has_edge = np.zeros(config.tokens, bool)  # along the current path, by depth
  for item, prefix in zip(items, shared, strict=True):
    inner = item.depths[:-1]
    has_edge[prefix:] = False
    added = np.array(
      [
        len(item.inputs) - prefix,
        np.count_nonzero(~has_edge[inner]) + 1,
        len(item.depths),
      ]
    )
    if (used + added > limits).any():
      runs.append([])
      has_edge[:] = False
      rows = len(item.depths)
      used, added = 0, np.array([len(item.inputs), rows, rows])
    runs[-1].append(item)
    has_edge[inner] = True
    used = used + added
  return runs


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Pack:
  """One pack before padding; arrays are named as in PackedBatch."""

  tree: types.PrefixTree
  edge_parent: np.ndarray
  edge_token: np.ndarray
  row_edge: np.ndarray
  old_logprob: np.ndarray
  advantage: np.ndarray
  weight: np.ndarray
  version: np.ndarray


def _lay_out(run: Sequence[_Item], config: PackConfig) -> _Pack:
  """Merges a run and finds its edges: distinct (parent, token) pairs."""
  tree = merge.merge([item.inputs for item in run])
  parent = np.concatenate(
    [path[item.depths - 1] for item, path in zip(run, tree.paths, strict=True)]
  ).astype(np.int64)
  token = np.concatenate([item.sequence[item.depths] for item in run])
  pair, row_edge = np.unique(
    parent << 32 | token.astype(np.int64), return_inverse=True
  )

  def rows(name: str) -> np.ndarray:
    return np.concatenate(
      [
        getattr(item.sample, name)[item.depths - len(item.sample.prompt_ids)]
        for item in run
      ]
    )

  return _Pack(
    tree=tree,
    edge_parent=pair >> 32,
    edge_token=pair & 0xFFFFFFFF,
    row_edge=row_edge,
    old_logprob=rows("logprobs"),
    advantage=rows("advantages"),
    weight=rows("weights"),
    version=rows("versions"),
  )


def _batch(packs: Sequence[_Pack], config: PackConfig) -> types.PackedBatch:
  """Pads packs to a device batch."""

  def fill(arrays, size, dtype, value=0):
    out = np.full((config.packs, size), value, dtype)
    for row, array in zip(out, arrays, strict=False):
      row[: len(array)] = array
    return out

  trees = [p.tree for p in packs]
  end_BT = np.tile(
    np.arange(1, config.tokens + 1, dtype=np.int32), (config.packs, 1)
  )
  for row, tree in zip(end_BT, trees, strict=False):
    row[: len(tree.tokens_T)] = tree.subtree_end_T
  tokens, edges, rows = config.tokens, config.edges, config.rows
  i32, f32 = np.int32, np.float32
  return types.PackedBatch(
    tokens_BT=fill([t.tokens_T for t in trees], tokens, i32),
    position_BT=fill([t.position_T for t in trees], tokens, i32),
    layout=layout.build(end_BT, config.block),
    edge_parent_BE=fill([p.edge_parent for p in packs], edges, i32),
    edge_token_BE=fill([p.edge_token for p in packs], edges, i32, -1),
    row_edge_BM=fill([p.row_edge for p in packs], rows, i32),
    old_logprob_BM=fill([p.old_logprob for p in packs], rows, f32),
    advantage_BM=fill([p.advantage for p in packs], rows, f32),
    weight_BM=fill([p.weight for p in packs], rows, f32),
    version_BM=fill([p.version for p in packs], rows, i32, -1),
  )


def _stats(
  items: Sequence[_Item],
  shared: Sequence[int],
  packs: Sequence[_Pack],
  config: PackConfig,
) -> PackStats:
  lengths = np.array([len(item.inputs) for item in items], np.int64)
  return PackStats(
    samples=len(items),
    request_tokens=int(lengths.sum()),
    unique_tokens=int(lengths.sum()) - sum(shared),
    packed_tokens=sum(len(p.tree.tokens_T) for p in packs),
    padded_tokens=-(-len(packs) // config.packs) * config.packs * config.tokens,
    rows=sum(len(p.row_edge) for p in packs),
    edges=sum(len(p.edge_token) for p in packs),
    packs=len(packs),
    request_pairs=int((lengths * (lengths + 1) // 2).sum()),
    packed_pairs=sum(int((p.tree.position_T + 1).sum()) for p in packs),
  )
