"""Plans on sizes alone: complete, within limits, cut where it is cheap."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from forge_jax.tree import plan

FLOPS = np.array([10.0, 5.0, 0.0, 0.1])


def _sizes(length, shared, rows):
  """Of sorted samples that share so many tokens with their predecessors."""
  length, shared, rows = (np.array(x, float) for x in (length, shared, rows))
  pairs, replayed = (x * (x + 1) / 2 for x in (length, shared))
  added = np.stack([length - shared, rows, rows, pairs - replayed])
  total = np.pad(np.cumsum(added, 1), ((0, 0), (1, 0)))
  nothing = np.zeros(len(length))
  replay = np.stack([shared, nothing, nothing, replayed])
  return plan.Sizes(total, replay, FLOPS)


def _random(rng, n):
  length = rng.integers(1, 60, n)
  shared = [0]
  for a, b in itertools.pairwise(length):
    shared.append(int(rng.integers(0, min(a, b) + 1)))
  return _sizes(length, shared, rng.integers(1, 20, n))


SHAPES = np.array([[16, 10, 6], [32, 20, 12], [64, 40, 24]])


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 5))
def test_every_sample_has_one_pack_within_the_limits(seed, n, packs):
  sizes = _random(np.random.default_rng(seed), n)
  groups = plan.batches(sizes, SHAPES, packs)
  made = [pack for group in groups for pack in group]
  held = [i for pack in made for run in pack for i in range(*run)]
  assert sorted(held) == list(range(n))
  for pack in made:
    assert pack == sorted(pack)
    need = sizes.of(pack).sum(1)
    assert (need[:3] <= SHAPES[-1]).all()
  assert [len(group) for group in groups[:-1]] == [packs] * (len(groups) - 1)
  assert 1 <= len(groups[-1]) <= packs


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 5))
@example(seed=5, n=33, packs=5)
def test_the_last_batch_gets_no_larger_shape_and_no_higher_cost(seed, n, packs):
  sizes = _random(np.random.default_rng(seed), n)

  def worst(made):
    need = np.max([sizes.of(pack).sum(1) for pack in made], axis=0)
    shape = next(i for i, s in enumerate(SHAPES) if (need[:3] <= s).all())
    return shape, need[plan.COST]

  one_by_one = sorted(
    (group[0] for group in plan.batches(sizes, SHAPES, 1)),
    key=lambda pack: -sizes.of(pack).sum(1)[plan.COST],
  )
  last = one_by_one[(len(one_by_one) - 1) // packs * packs :]
  assert worst(plan.batches(sizes, SHAPES, packs)[-1]) <= worst(last)


def test_a_chain_is_never_cut_inside():
  # Two rollouts of eight turns over one prompt of 10; each turn adds 3.
  turns = 10 + 3 * np.arange(1, 9)
  shared = np.concatenate([[0], turns[:-1], [10], turns[:-1]])
  sizes = _sizes(np.tile(turns, 2), shared, np.full(16, 1))
  shapes = np.array([[40, 99, 99]])
  assert sorted(plan.batches(sizes, shapes, 1)) == [[[(0, 8)]], [[(8, 16)]]]


def test_small_runs_fill_what_large_ones_leave():
  sizes = _sizes([50, 34, 30, 14], [0] * 4, [1] * 4)
  made = plan.batches(sizes, np.array([[64, 99, 99]]), 1)
  assert sorted(made) == [[[(0, 1), (3, 4)]], [[(1, 3)]]]


@pytest.mark.parametrize("rows", [4, 7, 30])
def test_rows_alone_can_cut(rows):
  # One token more each; tokens never bind.
  length = np.arange(1, 31)
  sizes = _sizes(length, length - 1, np.ones(30))
  made = plan.batches(sizes, np.array([[999, 999, rows]]), 1)
  assert len(made) == -(-30 // rows)


def test_edges_never_bound_a_run_beyond_its_rows():
  # Turns of 4 edges, two a pack; with their ancestors' they would pass 9.
  n, limit = 10, 9
  length = 10 * np.arange(1, n + 1)
  sizes = _sizes(length, length - 10, np.full(n, 4))
  sizes.replay[plan.EDGES] = 4 * np.arange(n)
  made = plan.batches(sizes, np.array([[999, limit, 999]]), 1)
  assert sorted(made) == [[[(i, i + 2)]] for i in range(0, n, 2)]


def test_small_trees_are_combined_in_any_order():
  # Two turns a tree. Side by side, trees of these sizes need four packs.
  trees = np.array([17, 48, 38, 21, 10, 40])
  length = np.stack([trees - 1, trees], 1).ravel()
  shared = np.stack([0 * trees, trees - 1], 1).ravel()
  sizes = _sizes(length, shared, np.ones(12))
  made = plan.batches(sizes, np.array([[64, 99, 99]]), 1)
  assert len(made) == 3
  assert sum(sizes.of(pack).sum(1)[plan.TOKENS] for [pack] in made) == 174


def test_many_small_samples_are_planned_in_few_steps(monkeypatch):
  n, asked = 5000, []
  between = plan.Sizes.between

  def count(self, before, total):
    asked.append(before.size // 4)
    return between(self, before, total)

  monkeypatch.setattr(plan.Sizes, "between", count)
  sizes = _sizes(np.full(n, 12), [0] + [10] * (n - 1), np.full(n, 2))
  made = plan.batches(sizes, np.array([[4096, 4096, 4096]]), 1)
  assert len(made) == 3
  assert sum(asked) < 10 * n  # not n squared
