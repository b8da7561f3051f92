"""Merging against a trie built token by token."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from forge_jax.tree import merge

sequences = st.lists(
  st.lists(st.integers(0, 2) | st.just(300), max_size=7), max_size=9
)


def _merge(lists):
  return merge.merge([np.array(s, np.int32) for s in lists])


@settings(deadline=None)
@given(sequences)
def test_is_the_trie_of_the_sequences(lists):
  tree = _merge(lists)
  prefixes = {tuple(s[: i + 1]) for s in lists for i in range(len(s))}
  assert len(tree.tokens_T) == len(prefixes)
  for sequence, path in zip(lists, tree.paths, strict=True):
    assert tree.tokens_T[path].tolist() == sequence
    assert tree.position_T[path].tolist() == list(range(len(sequence)))
    assert tree.parent_T[path].tolist() == [-1, *path[:-1]][: len(path)]


@settings(deadline=None)
@given(sequences)
def test_a_key_is_visible_exactly_to_its_descendants(lists):
  tree = _merge(lists)
  size = len(tree.tokens_T)
  for q in range(size):
    ancestors, node = set(), q
    while node >= 0:
      ancestors.add(node)
      node = tree.parent_T[node]
    visible = {k for k in range(q + 1) if q < tree.subtree_end_T[k]}
    assert visible == ancestors


def test_sequence_order_changes_paths_only():
  lists = [[1, 2, 3], [1, 2], [], [2], [1, 2, 3], [1, 300]]
  a, b = _merge(lists), _merge(lists[::-1])
  for name in ("tokens_T", "position_T", "parent_T", "subtree_end_T"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  for x, y in zip(a.paths, b.paths[::-1], strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("lists", [[], [[]], [[], []]])
def test_nothing_to_merge(lists):
  tree = _merge(lists)
  assert tree.tokens_T.shape == (0,)
  assert [len(path) for path in tree.paths] == [0] * len(lists)


def test_arrays_are_int32():
  tree = merge.merge([np.arange(3, dtype=np.int64)])
  arrays = (tree.tokens_T, tree.position_T, tree.parent_T, tree.subtree_end_T)
  assert {a.dtype for a in (*arrays, *tree.paths)} == {np.dtype(np.int32)}
