"""The packed tree's loss and gradients are those of the separate samples.

Packs are small, so that forests are cut and meet every bucket.
"""

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from experiments.benchmarks import tree_checks, tree_workloads
from forge_jax.tree import pack

CONFIG = pack.PackConfig(
  tokens=64, edges=64, rows=64, packs=2, block=8, buckets=2
)
COUNT, LENGTH = 24, 64
REDUCED = {
  name: tree_workloads.reduced(workload)
  for name, workload in tree_workloads.WORKLOADS.items()
}

_requests = jax.jit(jax.value_and_grad(toy.request_loss))


@functools.partial(jax.jit, static_argnums=2)
def _tree(params, batch, implementation):
  return jax.value_and_grad(toy.tree_loss)(
    params, batch, block=CONFIG.block, implementation=implementation
  )


def _relative_error(samples, batches, dtype, implementation="xla"):
  """Worst relative error of the loss and of a gradient leaf."""
  params = toy.init(0, dtype)
  tokens, *rest = toy.request_arrays(samples, COUNT, LENGTH)
  want = _requests(params, tokens, *(jnp.asarray(x, dtype) for x in rest))
  parts = [_tree(params, batch, implementation) for batch in batches]
  got = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
  # Terms of a loss, and gradients of few tokens, may cancel.
  scale = sum(float(np.abs(s.weights * s.advantages).sum()) for s in samples)

  def error(x, y):
    size = max(float(jnp.abs(y).max()), 1e-3 * scale)
    return float(jnp.abs(x - y).max()) / size

  leaves = jax.tree.leaves(jax.tree.map(error, got[1], want[1]))
  return max(abs(float(got[0] - want[0])) / scale, *leaves)


def _pack(samples):
  return pack.pack(samples, CONFIG, vocab_size=toy.VOCAB)


def _duplicate(rng):
  return [toy.sample(f"{i}/0", [1, 2], [3, 4, 5], rng=rng) for i in range(9)]


def _fork(rng):
  return [
    toy.sample(f"{i}/0", [1, 2, 3], [4, 5, i, i, 6], rng=rng) for i in range(5)
  ]


def _prefix(rng):
  """Samples that are prefixes of another, as prompts and as responses."""
  whole = rng.integers(0, 13, 20).tolist()
  return [
    toy.sample(f"{i}/0", whole[:cut], whole[cut:stop], rng=rng)
    for i, (cut, stop) in enumerate(
      [(3, 20), (3, 10), (9, 20), (9, 10), (19, 20), (1, 2), (5, 10)]
    )
  ]


def _workload(name):
  def make(rng):
    group = tree_workloads.episodes(REDUCED[name], rng, toy.VOCAB)
    return tree_workloads.requests(group)

  return pytest.param(make, id=name)


SHAPES = [_duplicate, _fork, _prefix, *map(_workload, REDUCED)]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("make", SHAPES)
def test_float64(make, implementation):
  samples = make(np.random.default_rng(0))
  batches, _ = _pack(samples)
  with jax.enable_x64(True):
    error = _relative_error(samples, batches, jnp.float64, implementation)
  assert error <= 1e-12


@pytest.mark.parametrize("make", SHAPES)
def test_float32(make):
  samples = make(np.random.default_rng(0))
  assert _relative_error(samples, _pack(samples)[0], jnp.float32) <= 1e-5


def test_a_wrong_tree_is_noticed():
  samples = _prefix(np.random.default_rng(0))
  [batch], _ = _pack(samples)
  moved = dataclasses.replace(batch, position_BT=batch.position_BT[:, ::-1])
  parent = np.maximum(batch.edge_parent_BE - 1, 0)
  shifted = dataclasses.replace(batch, edge_parent_BE=parent)
  for wrong in (moved, shifted):
    assert _relative_error(samples, [wrong], jnp.float32) > 1e-2


def test_random_forests():
  """Also across cuts, and at every size that a device batch may have."""
  sizes, replayed = set(), 0

  @settings(max_examples=500)
  @given(st.integers(0, 2**32 - 1), st.integers(1, COUNT))
  def check(seed, count):
    nonlocal replayed
    samples = toy.random_samples(np.random.default_rng(seed), count)
    batches, stats = _pack(samples)
    if not batches:
      return
    sizes.update(batch.tokens_BT.shape[1] for batch in batches)
    replayed += stats.packed_tokens > stats.unique_tokens
    with jax.enable_x64(True):
      assert _relative_error(samples, batches, jnp.float64) <= 1e-12

  check()
  assert len(sizes) == CONFIG.buckets
  assert replayed > 10


def test_a_compilation_for_each_size_serves_every_tree():
  traces = 0

  @jax.jit
  def loss(params, batch):
    nonlocal traces
    traces += 1
    return toy.tree_loss(
      params, batch, block=CONFIG.block, implementation="xla"
    )

  params, sizes = toy.init(0, jnp.float32), set()
  for seed in range(20):
    rng = np.random.default_rng(seed)
    for batch in _pack(toy.random_samples(rng, 1 + seed))[0]:
      sizes.add(batch.tokens_BT.shape)
      assert np.isfinite(loss(params, batch))
  assert traces == len(sizes) <= CONFIG.buckets


@pytest.mark.parametrize("remat", ["elementwise", "layer"])
@pytest.mark.parametrize("kv_heads", [4, 2])  # multi-head and grouped-query
def test_the_decoder_in_float64(kv_heads, remat):
  model = dataclasses.replace(tree_checks.MODEL, num_kv_heads=kv_heads)
  check = tree_checks.Equivalence(model, wide=True, remat=remat)
  for name in ("strip", "compaction"):
    assert check.error(tree_checks.reduced(name)) <= 1e-12


def test_the_decoder_in_bfloat16():
  """The tree is as near to float32 as samples one by one are."""
  samples = tree_checks.reduced("append")
  exact = tree_checks.Equivalence(wide=False).separate(samples)
  check = tree_checks.Equivalence(wide=False, compute="bfloat16")
  batches, _ = pack.pack(
    samples, tree_checks.PACK, vocab_size=tree_checks.MODEL.vocab_size
  )
  separate = tree_checks.worst(check.separate(samples)[1], exact[1])
  tree = tree_checks.worst(check.tree(batches)[1], exact[1])
  assert 1e-4 < tree < 2 * separate
