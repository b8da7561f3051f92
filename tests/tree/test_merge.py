"""Merging against a trie built token by token."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from forge_jax.tree import merge

NODES = (
  "tokens_T",
  "position_T",
  "parent_T",
  "subtree_end_T",
  "samples_T",
)
sequences = st.lists(
  st.lists(st.integers(0, 2) | st.just(300), max_size=7), max_size=9
)


def _merge(lists):
  return merge.merge([np.array(s, np.int32) for s in lists])


@given(sequences)
def test_is_the_trie_of_the_sequences(lists):
  tree = _merge(lists)
  prefixes = {tuple(s[: i + 1]) for s in lists for i in range(len(s))}
  assert len(tree.tokens_T) == len(prefixes)
  count = np.zeros(len(tree.tokens_T), int)
  for i, sequence in enumerate(lists):
    path = tree.path(i)
    count[path] += 1
    assert tree.tokens_T[path].tolist() == sequence
    assert tree.position_T[path].tolist() == list(range(len(sequence)))
    assert tree.parent_T[path].tolist() == [-1, *path[:-1]][: len(path)]
  assert tree.samples_T.tolist() == count.tolist()
  assert tree.length.tolist() == [len(s) for s in lists]


@given(sequences)
def test_branches_lie_side_by_side_in_the_order_of_the_sequences(lists):
  tree = _merge(lists)
  seen, size = set(), 0
  for i in tree.order:
    path, start = tree.path(i).tolist(), int(tree.branch_start[i])
    new = [node for node in path if node not in seen]
    assert start == size
    assert (
      new == path[tree.branch_depth[i] :] == [*range(size, size + len(new))]
    )
    parent = tree.branch_parent[i]
    if parent >= 0:
      fork = path[tree.branch_depth[i] - 1]
      above = tree.path(parent)[tree.branch_depth[parent] :]
      assert fork in above
    seen.update(new)
    size += len(new)


@given(sequences)
def test_nothing_is_shared_unless_asked(lists):
  arrays = [np.array(s, np.int32) for s in lists]
  tree = merge.merge(arrays, share=False)
  assert tree.samples_T.tolist() == [1] * sum(map(len, lists))
  for i, sequence in enumerate(lists):
    path, start = tree.path(i), tree.branch_start[i]
    assert tree.tokens_T[path].tolist() == sequence
    assert tree.position_T[path].tolist() == list(range(len(path)))
    assert tree.subtree_end_T[path].tolist() == [start + len(path)] * len(path)


@given(st.integers(0, 9000), st.integers(0, 9000), st.integers(0, 9000))
def test_common_prefix(length, other, differs):
  a, b = np.zeros(length, np.int32), np.zeros(other, np.int32)
  b[differs : differs + 1] = 1
  want = min(length, other, differs)
  assert merge.common_prefix(a, b) == merge.common_prefix(b, a) == want


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
  for name in NODES:
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  for i in range(len(lists)):
    np.testing.assert_array_equal(a.path(i), b.path(len(lists) - 1 - i))


@pytest.mark.parametrize("lists", [[], [[]], [[], []]])
def test_nothing_to_merge(lists):
  tree = _merge(lists)
  assert tree.tokens_T.shape == (0,)
  assert [len(tree.path(i)) for i in range(len(lists))] == [0] * len(lists)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint16])
def test_arrays_are_int32(dtype):
  tree = merge.merge([np.arange(3, dtype=dtype), np.arange(2, dtype=dtype)])
  for field in dataclasses.fields(tree):
    assert getattr(tree, field.name).dtype == np.int32, field.name
  assert tree.path(0).dtype == np.int32 and tree.path(0).tolist() == [0, 1, 2]


def test_sequences_of_different_dtypes_share():
  tree = merge.merge([np.arange(3, dtype=np.int64), np.arange(4, dtype=">i4")])
  assert tree.tokens_T.tolist() == [0, 1, 2, 3]
