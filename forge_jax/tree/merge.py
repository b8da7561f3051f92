"""Merges sequences that share prefixes into one forest, on the host.

1. Sort the sequences lexicographically: every prefix's owners become
   neighbours, and the order is a depth-first one of the prefix forest.
2. What a sequence adds to the forest is what its longest common prefix with
   its predecessor leaves over.
3. A token's subtree ends where the first later sequence branches off at or
   above it.

Python does work per sequence; work per token is NumPy's.
"""

from collections.abc import Sequence

import numpy as np

from forge_jax import types


def sort_key(sequence: np.ndarray) -> bytes:
  """Bytes that compare as the token sequences do: prefixes first."""
  return sequence.astype(">u4").tobytes()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
  """Length of the longest common prefix of two token sequences."""
  size = min(len(a), len(b))
  differs = a[:size] != b[:size]
  first = int(differs.argmax()) if size else 0
  return first if size and differs[first] else size


def merge(sequences: Sequence[np.ndarray]) -> types.PrefixTree:
  """Merges token sequences into a prefix forest in depth-first order.

  Equal sequences and sequences that are prefixes of others share all their
  tokens; an empty sequence has an empty path. The result depends on the
  sequences alone, `paths` being in the order they are given.

  Args:
    sequences: int arrays [length], non-negative ids, any lengths.

  Returns:
    The forest of T distinct tokens.
  """
  order = sorted(range(len(sequences)), key=lambda i: sort_key(sequences[i]))
  total = sum(map(len, sequences))
  longest = max(map(len, sequences), default=0)
  tokens = np.empty(total, np.int32)
  position = np.empty(total, np.int32)
  parent = np.empty(total, np.int32)
  end = np.empty(total, np.int32)
  # The current root-to-leaf path; path[0] is the virtual root of the forest.
  path = np.full(longest + 1, -1, np.int32)
  paths = [np.empty(0, np.int32)] * len(sequences)
  previous, size = np.empty(0, np.int32), 0
  for i in order:
    sequence = sequences[i]
    shared, length = common_prefix(previous, sequence), len(sequence)
    end[path[1 + shared : 1 + len(previous)]] = size
    new = slice(size, size + length - shared)
    path[1 + shared : 1 + length] = np.arange(new.start, new.stop)
    tokens[new] = sequence[shared:]
    position[new] = np.arange(shared, length)
    parent[new] = path[shared:length]
    paths[i] = path[1 : 1 + length].copy()
    previous, size = sequence, new.stop
  end[path[1 : 1 + len(previous)]] = size
  return types.PrefixTree(
    tokens_T=tokens[:size].copy(),
    position_T=position[:size].copy(),
    parent_T=parent[:size].copy(),
    subtree_end_T=end[:size].copy(),
    paths=tuple(paths),
  )
