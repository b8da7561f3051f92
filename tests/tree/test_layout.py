"""Block plans against the dense visibility."""

import jax
import numpy as np
import pytest

from forge_jax.tree import layout, merge
from forge_jax.tree.attention import reference


def random_end(rng, tokens, count=6, alphabet=2):
  """subtree_end of a random forest, padded to `tokens`."""
  sequences = [
    rng.integers(0, alphabet, rng.integers(1, tokens // count))
    for _ in range(count)
  ]
  end_T = np.arange(1, tokens + 1, dtype=np.int32)
  tree = merge.merge(sequences)
  end_T[: len(tree.tokens_T)] = tree.subtree_end_T
  return end_T


@pytest.mark.parametrize("block", [4, 8, 64])
def test_plans_list_exactly_the_visible_block_pairs(block):
  rng = np.random.default_rng(block)
  end_BT = np.stack([random_end(rng, 64) for _ in range(5)])
  plan = layout.build(end_BT, block)
  blocks = 64 // block
  visible = np.asarray(reference.visible(plan)).reshape(
    5, blocks, block, blocks, block
  )
  for b, dense in enumerate(visible.any((2, 4))):
    start = plan.query_start[b]
    by_query = [
      (i, int(j))
      for i in range(blocks)
      for j in plan.key_block[b, start[i] : start[i + 1]]
    ]
    start = plan.key_start[b]
    by_key = [
      (int(i), j)
      for j in range(blocks)
      for i in plan.query_block[b, start[j] : start[j + 1]]
    ]
    want = list(zip(*map(np.ndarray.tolist, np.nonzero(dense)), strict=True))
    assert by_query == want
    assert sorted(by_key) == want and len(by_key) == len(want)


def test_a_single_sequence_fills_the_lower_triangle():
  plan = layout.build(np.full((1, 64), 64, np.int32), 16)
  assert plan.key_block.shape == (1, layout.plan_capacity(64, 16)) == (1, 10)
  assert plan.query_start[0, -1] == plan.key_start[0, -1] == 10


def test_a_large_pack_of_separate_sequences_has_few_pairs():
  tokens, block = 65536, 128
  end = np.repeat(np.arange(1, 65) * 1024, 1024).astype(np.int32)
  plan = layout.build(end[None], block)
  pairs = 64 * 8 * 9 // 2
  assert plan.query_start[0, -1] == plan.key_start[0, -1] == pairs
  assert plan.key_block.shape == (1, layout.plan_capacity(tokens, block))
  assert not plan.key_block[0, pairs:].any()


def test_a_layout_is_a_pytree():
  plan = layout.build(np.full((1, 8), 8, np.int32), 4)
  assert len(jax.tree.leaves(plan)) == 5
