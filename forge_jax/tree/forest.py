"""The forest of all samples of a pack call, and the parts of it packs hold.

Samples are numbered in depth-first order. A part is the tokens that chosen
samples pass through, in the forest's order; so a subtree's tokens stay side by
side, and where it ends is the number of the part's tokens before its old end.
"""

import dataclasses

import numpy as np

from forge_jax import types
from forge_jax.tree import cost as cost_lib
from forge_jax.tree import items as items_lib
from forge_jax.tree import merge, plan

_FIELDS = ("old_logprob", "advantage", "weight", "version")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Forest:
  """n merged samples with their rows, by sample in depth-first order."""

  tree: types.PrefixTree
  length: np.ndarray  # int [n], tokens of the sample
  depth: np.ndarray  # int [n], of them shared with samples before it
  start: np.ndarray  # int [n + 1], first token of its branch; the end
  last: np.ndarray  # int32 [n], where in T its last token lies
  row_start: np.ndarray  # int [n + 1], its first row; the end
  row_edge: np.ndarray  # int [rows]
  edge_parent: np.ndarray  # int [edges], where in T; edges are in its order
  edge_token: np.ndarray  # int [edges]
  rows: dict[str, np.ndarray]  # by name of the figure, each [rows]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Part:
  """One pack before padding; arrays are named as in PackedBatch."""

  tokens: np.ndarray
  position: np.ndarray
  parent: np.ndarray
  samples: np.ndarray
  subtree_end: np.ndarray
  edge_parent: np.ndarray
  edge_token: np.ndarray
  row_edge: np.ndarray
  rows: dict[str, np.ndarray]


def grow(items: items_lib.Items, *, share: bool) -> Forest:
  """Merges at least one item; not `share`: each is a tree of its own."""
  tree = merge.merge(items.inputs, share=share)
  order = tree.order
  rank = np.empty_like(order)
  rank[order] = np.arange(len(order))
  by_rank = np.argsort(rank[items.row_item], kind="stable")
  item, depth = items.row_item[by_rank], items.row_depth[by_rank]
  parent = tree.find(item, depth - 1).astype(np.int64)
  edge, row_edge = _distinct(parent << 32 | items.row_token[by_rank])
  return Forest(
    tree=tree,
    length=tree.length[order].astype(np.int64),
    depth=tree.branch_depth[order].astype(np.int64),
    start=np.append(tree.branch_start[order], len(tree.tokens_T)),
    last=tree.find(order, tree.length[order] - 1),
    row_start=_ends(items.count()[order]),
    row_edge=row_edge,
    edge_parent=edge >> 32,
    edge_token=edge & 0xFFFFFFFF,
    rows={name: getattr(items, name)[by_rank] for name in _FIELDS},
  )


def sizes(forest: Forest, cost: cost_lib.Cost) -> plan.Sizes:
  """What the samples need, for a plan."""
  new_edges, above = _edges(forest)
  pairs, shared_pairs = _triangle(forest.length), _triangle(forest.depth)
  added = [
    forest.length - forest.depth,
    new_edges,
    np.diff(forest.row_start),
    pairs - shared_pairs,
  ]
  replay = [forest.depth, above, np.zeros_like(above), shared_pairs]
  return plan.Sizes(
    total=np.stack([_ends(column) for column in added]).astype(np.float64),
    replay=np.stack(replay).astype(np.float64),
    flops=np.array([cost.token, cost.edge, 0.0, cost.pair]),
  )


def _edges(forest: Forest) -> tuple[np.ndarray, np.ndarray]:
  """Bounds on the edges a sample adds and on those of its ancestors.

  An edge whose token is in the forest counts for the first sample that has
  it. The edge after a sample's inputs always counts.
  """
  tree, n = forest.tree, len(forest.length)
  samples = np.repeat(np.arange(n), np.diff(forest.row_start))
  inner = np.ones(len(samples), bool)
  inner[forest.row_start[1:] - 1] = False  # a sample's last row is its deepest
  parent = forest.edge_parent[forest.row_edge[inner]]
  samples = samples[inner]
  node = tree.find(tree.order[samples], tree.position_T[parent] + 1)
  owner = np.full(len(tree.tokens_T), -1)
  owner[node[::-1]] = samples[::-1]  # of equal places, the last is written
  owned = np.flatnonzero(owner >= 0)
  new = np.bincount(owner[owned], minlength=n) + 1
  # Ancestors-or-self with an edge: those begun less those ended.
  change = np.zeros(len(owner) + 1, np.int64)
  change[owned] = 1
  change -= np.bincount(tree.subtree_end_T[owned], minlength=len(change))
  forked = np.flatnonzero(forest.depth)
  fork = tree.find(tree.order[forked], forest.depth[forked] - 1)
  above = np.zeros(n, np.int64)
  above[forked] = np.cumsum(change)[fork]
  return new, above


def part(forest: Forest, pack: plan.Pack) -> Part:
  """The part of the forest that a pack's samples pass through."""
  tree = forest.tree
  node = _nodes(forest, pack)
  samples = np.concatenate([np.arange(*run) for run in pack])
  rows = np.concatenate(
    [np.arange(*forest.row_start[list(run)]) for run in pack]
  )
  edge, row_edge = _distinct(forest.row_edge[rows])
  end = np.searchsorted(node, tree.subtree_end_T[node])
  parent = tree.parent_T[node]
  # A token stands for the samples that end in its subtree.
  last = np.searchsorted(node, forest.last[samples])
  ends = _ends(np.bincount(last, minlength=len(node)))
  return Part(
    tokens=tree.tokens_T[node],
    position=tree.position_T[node],
    parent=np.where(parent < 0, -1, np.searchsorted(node, parent)),
    samples=ends[end] - ends[:-1],
    subtree_end=end,
    edge_parent=np.searchsorted(node, forest.edge_parent[edge]),
    edge_token=forest.edge_token[edge],
    row_edge=row_edge,
    rows={name: values[rows] for name, values in forest.rows.items()},
  )


def _nodes(forest: Forest, pack: plan.Pack) -> np.ndarray:
  """Where in T a pack's tokens lie, in order."""
  parts = []
  for first, stop in pack:
    depth = np.arange(forest.depth[first], dtype=np.int32)
    sample = np.full(len(depth), forest.tree.order[first])
    parts.append(forest.tree.find(sample, depth))
    branches = (forest.start[first], forest.start[stop])
    parts.append(np.arange(*branches, dtype=np.int32))
  nodes = np.concatenate(parts)
  if _increasing(nodes):  # one run, or no ancestors to replay
    return nodes
  nodes.sort(kind="stable")  # a few increasing stretches
  return nodes[np.diff(nodes, prepend=-1) > 0]


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Sorted distinct values, and the place of each value among them."""
  if _increasing(values):
    return values, np.arange(len(values))
  return np.unique(values, return_inverse=True)


def _increasing(values: np.ndarray) -> bool:
  return bool((values[1:] > values[:-1]).all())


def _ends(counts: np.ndarray) -> np.ndarray:
  """Sums of all counts before each place and in all; int [n + 1]."""
  return np.concatenate([[0], np.cumsum(counts)])


def _triangle(length: np.ndarray) -> np.ndarray:
  """Visible pairs of a sequence by itself."""
  return length * (length + 1) // 2
