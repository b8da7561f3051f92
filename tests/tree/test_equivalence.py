"""The packed tree's loss and gradients are those of the separate samples."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from forge_jax.tree import pack

CONFIG = pack.PackConfig(tokens=64, edges=32, rows=48, packs=2, block=8)
COUNT, LENGTH = 16, 40

_requests = jax.jit(jax.value_and_grad(toy.request_loss))


@functools.partial(jax.jit, static_argnums=2)
def _tree(params, batch, implementation):
  return jax.value_and_grad(toy.tree_loss)(
    params, batch, block=CONFIG.block, implementation=implementation
  )


def _relative_error(samples, dtype, implementation):
  """Worst relative error of the loss and of a gradient leaf."""
  params = toy.init(0, dtype)
  arrays = toy.request_arrays(samples, COUNT, LENGTH)
  tokens, *rest = arrays
  want = _requests(params, tokens, *(jnp.asarray(x, dtype) for x in rest))
  batches, _ = pack.pack(samples, CONFIG, vocab_size=toy.VOCAB)
  parts = [_tree(params, batch, implementation) for batch in batches]
  got = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
  scale = sum(
    float(np.abs(s.weights * s.advantages).sum()) for s in samples
  )  # of a loss whose terms may cancel

  def error(x, y):
    size = max(float(jnp.abs(y).max()), 1e-3 * scale)
    return float(jnp.abs(x - y).max()) / size

  return max(jax.tree.leaves(jax.tree.map(error, got, want)))


def _append(rng):
  """Three turns that extend one another, by two rollouts of one prompt."""
  samples, prompt = [], rng.integers(0, 13, 6)
  for rollout in range(2):
    history = prompt
    for turn in range(3):
      action, seen = rng.integers(0, 13, 4), rng.integers(0, 13, 3)
      name = f"{rollout}/{turn}"
      samples.append(toy.sample(name, history, action, rng=rng))
      history = np.concatenate([history, action, seen])
  return samples


def _strip(rng):
  """Earlier turns lose the first half of their response."""
  samples, history = [], rng.integers(0, 13, 6)
  for turn in range(4):
    action, seen = rng.integers(0, 13, 6), rng.integers(0, 13, 2)
    samples.append(toy.sample(f"0/{turn}", history, action, rng=rng))
    history = np.concatenate([history, action[3:], seen])
  return samples


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


SHAPES = [_append, _strip, _duplicate, _fork, _prefix]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("make", SHAPES)
def test_float64(make, implementation):
  samples = make(np.random.default_rng(0))
  with jax.enable_x64(True):
    assert _relative_error(samples, jnp.float64, implementation) <= 1e-12


@pytest.mark.parametrize("make", SHAPES)
def test_float32(make):
  samples = make(np.random.default_rng(0))
  assert _relative_error(samples, jnp.float32, "xla") <= 1e-5


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, COUNT))
def test_random_forests(seed, count):
  samples = toy.random_samples(np.random.default_rng(seed), count)
  if not any(s.weights.any() for s in samples):
    return
  with jax.enable_x64(True):
    assert _relative_error(samples, jnp.float64, "xla") <= 1e-12


def test_one_compilation_serves_every_tree_of_a_shape():
  traces, shapes = 0, set()

  @jax.jit
  def loss(params, batch):
    nonlocal traces
    traces += 1
    return toy.tree_loss(
      params, batch, block=CONFIG.block, implementation="xla"
    )

  params = toy.init(0, jnp.float32)
  for seed in range(20):
    rng = np.random.default_rng(seed)
    samples = toy.random_samples(rng, 1 + seed)
    for batch in pack.pack(samples, CONFIG, vocab_size=toy.VOCAB)[0]:
      assert np.isfinite(loss(params, batch))
      shapes.add(batch.tokens_BT.shape)
  assert traces == len(shapes) <= CONFIG.buckets
