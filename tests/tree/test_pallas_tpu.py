"""The TPU kernels, interpreted on the CPU, against the dense reference."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from test_layout import random_end

from forge_jax import errors, types
from forge_jax.tree import layout
from forge_jax.tree.attention import pallas_tpu, reference

BLOCK = 128
TOKENS = 4 * BLOCK


def _forest(rng):
  """Every pair is partly visible; the last tokens are padding."""
  return random_end(rng, TOKENS)


def _chain(rng):
  """One sequence: most pairs are visible as a whole, which skips the mask."""
  length = int(rng.integers(3 * BLOCK, TOKENS))
  end_T = np.arange(1, TOKENS + 1, dtype=np.int32)
  end_T[:length] = length
  return end_T


def _inputs(seed, forests, *, H, K, C=64, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  end_BT = np.stack([forest(rng) for forest in forests])
  q, k, v, do = (
    jnp.asarray(rng.normal(size=(len(forests), TOKENS, X, C)), dtype)
    for X in (H, K, K, H)
  )
  plan = jax.tree.map(jnp.asarray, layout.build(end_BT, BLOCK))
  return q, k, v, do, plan


def _value_and_grads(attend):
  def run(q, k, v, do, plan):
    o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, plan), q, k, v)
    return o, *pull(do)

  return run


def _assert_close(got, want, tolerance):
  for x, y in zip(got, want, strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


reference_grads = jax.jit(_value_and_grads(reference.attention))


@pytest.mark.parametrize(
  ("shape", "packs", "tolerance"),
  [
    ({"H": 6, "K": 2}, [(_forest, _chain), (_chain, _forest)], 2e-6),
    ({"H": 2, "K": 2, "C": 128}, [(_forest,), (_chain,)], 2e-6),
    ({"H": 3, "K": 1, "dtype": jnp.bfloat16}, [(_forest,), (_chain,)], 1e-2),
  ],
)
def test_values_and_gradients_equal_the_reference(shape, packs, tolerance):
  traces = 0

  @jax.jit
  @_value_and_grads
  def kernels_grads(q, k, v, plan):
    nonlocal traces
    traces += 1
    return pallas_tpu.attention(q, k, v, plan, BLOCK, interpret=True)

  for seed, forests in enumerate(packs):
    args = _inputs(seed, forests, **shape)
    _assert_close(kernels_grads(*args), reference_grads(*args), tolerance)
  assert traces == 1


def test_copies_of_dq_never_race():
  # Two cores share the key heads, and a copy happens when it is awaited, no
  # sooner: a part of dq that is read too early lacks what was added to it.
  machine = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)

  @jax.jit
  @_value_and_grads
  def kernels_grads(q, k, v, plan):
    return pallas_tpu.attention(q, k, v, plan, BLOCK, interpret=machine)

  args = _inputs(2, [_forest, _chain], H=2, K=2)
  _assert_close(kernels_grads(*args), reference_grads(*args), 2e-6)


def _shapes(B, T, block, *, C=64, dtype=jnp.bfloat16):
  """Arguments of attention that have shapes only."""
  shape = jax.ShapeDtypeStruct
  heads = shape((B, T, 2, C), dtype)
  start = shape((B, T // block + 1), jnp.int32)
  pairs = shape((B, layout.plan_capacity(T, block)), jnp.int32)
  plan = types.TreeLayout(shape((B, T), jnp.int32), start, pairs, start, pairs)
  return heads, heads, heads, plan, block


def test_what_the_kernels_cannot_do_is_refused_with_numbers():
  def refused(match, *args, **kwargs):
    with pytest.raises(errors.ConfigError, match=match):
      pallas_tpu.attention(*_shapes(*args, **kwargs))

  refused("64 or 128 channels, not 80", 1, 512, 128, C=80)
  refused("float32, not float16", 1, 512, 128, dtype=jnp.float16)
  refused("multiple of 128 tokens, not 64", 1, 512, 64)
  # 512 blocks a pack: twice 131,328 pairs do not fit in 1 MiB.
  refused("2 packs of 65536 tokens.*block=256 fits", 2, 65536, 128)
