"""Merges sequences that share prefixes into one forest, on the host.

1. Sort the sequences by their tokens' bytes. Any order of fixed-width words
   makes the owners of a prefix neighbours and puts a prefix before what
   extends it, which is all that a depth-first order of the prefix forest
   asks; so the bytes are the machine's own and need no swap.
2. What a sequence adds to the forest, its branch, is what its longest common
   prefix with its predecessor leaves over.
3. A token's subtree ends where the first later branch forks off above it.

Python does work per sequence; work per request token is the copy of its bytes,
their comparison with a neighbour's and the sort's own; all other work is per
distinct token, in NumPy.
"""

from collections.abc import Sequence
import itertools

import numpy as np

from forge_jax import types

_CHUNK = 2048  # tokens compared at a time


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
  """Length of the longest common prefix of two token sequences."""
  size = min(len(a), len(b))
  for start in range(0, size, _CHUNK):
    stop = min(start + _CHUNK, size)
    differs = a[start:stop] != b[start:stop]
    first = int(differs.argmax())
    if differs[first]:
      return start + first
  return size


def merge(
  sequences: Sequence[np.ndarray], *, share: bool = True
) -> types.PrefixTree:
  """Merges token sequences into a prefix forest in depth-first order.

  Equal sequences and sequences that are prefixes of others share all their
  tokens; an empty sequence has an empty path. The trees depend on the
  sequences alone, not on their order; equal sequences keep theirs.

  Args:
    sequences: int arrays [length], ids in [0, 2**31), any lengths.
    share: False leaves every sequence a tree of its own.

  Returns:
    The forest of T distinct tokens.
  """
  sequences = [np.asarray(s).astype(np.int32, copy=False) for s in sequences]
  keys = [s.tobytes() for s in sequences]
  order = sorted(range(len(keys)), key=keys.__getitem__)
  del keys  # as large as the sequences
  ordered = [sequences[i] for i in order]
  shared = [0] * len(order)
  if share:
    pairs = itertools.pairwise(ordered)
    shared[1:] = [common_prefix(a, b) for a, b in pairs]
  return _forest(ordered, shared, np.array(order, np.int32))


def _forest(
  ordered: Sequence[np.ndarray], shared: Sequence[int], order: np.ndarray
) -> types.PrefixTree:
  """The forest of sorted sequences and their prefixes with predecessors."""
  length = np.array([len(s) for s in ordered], np.int32)
  depth = np.array(shared, np.int32)
  added = length - depth
  stop = np.cumsum(added, dtype=np.int32)
  start = stop - added
  size = int(stop[-1]) if len(stop) else 0
  index = np.arange(size, dtype=np.int32)
  end, fork, last = _walk(shared, length.tolist(), start.tolist(), index)

  parent = index - 1
  parent[start[added > 0]] = fork[added > 0]
  # A token stands for the sequences that end in its subtree: ends[i] of all
  # end before token i.
  last = np.sort(last[last >= 0])
  steps = np.diff(np.concatenate([[-1], last, [size]]))
  ends = np.repeat(np.arange(len(steps), dtype=np.int32), steps)
  # Of the branches that start where one is empty, the last holds tokens.
  holder = np.searchsorted(start, fork, "right") - 1

  def given(values):
    """From depth-first order to the order given."""
    out = np.empty_like(values)
    out[order] = values
    return out

  tokens = [s[d:] for s, d in zip(ordered, shared, strict=True)]
  return types.PrefixTree(
    tokens_T=np.concatenate([np.empty(0, np.int32), *tokens]),
    position_T=index - np.repeat(start - depth, added),
    parent_T=parent,
    subtree_end_T=end,
    samples_T=ends[end] - ends[:-1],
    length=given(length),
    branch_start=given(start),
    branch_depth=given(depth),
    branch_parent=given(np.where(fork < 0, -1, order[holder])),
    order=order,
  )


def _walk(
  shared: Sequence[int],
  length: Sequence[int],
  start: Sequence[int],
  index_T: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Subtree ends, and of each sequence the token above its branch and its last.

  Invariant: path[1 + d] is where in T the current sequence's token of depth d
  lies; path[0] is -1, the virtual root of the forest.
  """
  end = np.full(len(index_T), len(index_T), np.int32)
  path = np.full(max(length, default=0) + 1, -1, np.int32)
  fork, last = (np.empty(len(length), np.int32) for _ in range(2))
  previous = 0
  for i, (depth, size, first) in enumerate(
    zip(shared, length, start, strict=True)
  ):
    end[path[1 + depth : 1 + previous]] = first
    path[1 + depth : 1 + size] = index_T[first : first + size - depth]
    fork[i], last[i] = path[depth], path[size]
    previous = size
  return end, fork, last
