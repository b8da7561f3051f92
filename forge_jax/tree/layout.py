"""Block plans of tree attention; the packed carriers as JAX pytrees.

Importing this module lets `TreeLayout` and `PackedBatch` cross `jax.jit`.
"""

import jax
import numpy as np

from forge_jax import types

jax.tree_util.register_dataclass(types.TreeLayout)
jax.tree_util.register_dataclass(types.PackedBatch)


def plan_capacity(tokens: int, block: int) -> int:
  """Most visible block pairs N of a pack: the lower triangle."""
  blocks = tokens // block
  return blocks * (blocks + 1) // 2


def build(subtree_end_BT: np.ndarray, block: int) -> types.TreeLayout:
  """The layout of B packs with its block plan.

  Args:
    subtree_end_BT: int32, exclusive ends; T is a multiple of `block`.
    block: tokens of a block.
  """
  plans = [_block_plan(end_T, block) for end_T in subtree_end_BT]
  return types.TreeLayout(
    subtree_end_BT, *(np.stack(arrays) for arrays in zip(*plans, strict=True))
  )


def _block_plan(
  subtree_end_T: np.ndarray, block: int
) -> tuple[np.ndarray, ...]:
  """Visible block pairs by query block, then by key block (see TreeLayout).

  Subtrees are contiguous, so key block j is seen by the query blocks from j
  to that of the last token any of its subtrees holds: an interval.
  """
  tokens = len(subtree_end_T)
  blocks = tokens // block
  last = (subtree_end_T.reshape(blocks, block).max(1) - 1) // block
  index = np.arange(blocks, dtype=np.int32)
  visible = (index <= index[:, None]) & (index[:, None] <= last)
  capacity = plan_capacity(tokens, block)
  plan = []
  for by_row in (visible, np.ascontiguousarray(visible.T)):
    start = np.zeros(blocks + 1, np.int32)
    np.cumsum(by_row.sum(1), out=start[1:])
    column = np.zeros(capacity, np.int32)
    column[: start[-1]] = np.broadcast_to(index, by_row.shape)[by_row]
    plan += [start, column]
  return tuple(plan)
