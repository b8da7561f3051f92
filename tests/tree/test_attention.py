"""The block-sparse attention against the dense reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layout import random_end

from forge_jax import errors
from forge_jax.tree import attention, layout
from forge_jax.tree.attention import reference


def _inputs(seed, *, B=2, T=48, H=4, K=2, C=5, block=8, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  end_BT = np.stack([random_end(rng, T) for _ in range(B)])
  q, k, v, do = (
    jnp.asarray(rng.normal(size=(B, T, X, C)), dtype) for X in (H, K, K, H)
  )
  return (q, k, v), do, jax.tree.map(jnp.asarray, layout.build(end_BT, block))


def _value_and_grads(args, do, plan, block, implementation):
  def attend(q, k, v):
    return attention.tree_attention(
      q, k, v, plan, block=block, implementation=implementation
    )

  o, pull = jax.vjp(attend, *args)
  return o, *pull(do)


def _assert_equal(args, do, plan, block, tolerance):
  got = jax.jit(_value_and_grads, static_argnums=(3, 4))(
    args, do, plan, block, "xla"
  )
  want = _value_and_grads(args, do, plan, block, "reference")
  for x, y in zip(got, want, strict=True):
    assert x.dtype == y.dtype == args[0].dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


@pytest.mark.parametrize(
  "shape",
  [
    {"B": 1, "H": 9, "K": 3, "C": 8, "T": 64, "block": 16},
    {"B": 3, "H": 6, "K": 1, "C": 3},
    {"B": 2, "H": 5, "K": 5, "C": 7, "block": 48},
    {"B": 1, "H": 2, "K": 2, "C": 1, "T": 24, "block": 1},
  ],
)
def test_values_and_gradients_equal_the_reference(shape):
  args, do, plan = _inputs(0, **shape)
  _assert_equal(args, do, plan, shape.get("block", 8), 1e-5)


def test_float64_agrees_to_rounding():
  with jax.enable_x64(True):
    args, do, plan = _inputs(1, dtype=jnp.float64)
    _assert_equal(args, do, plan, 8, 1e-13)


def test_bfloat16_accumulates_in_float32():
  args, do, plan = _inputs(2, B=1, T=256, dtype=jnp.bfloat16)
  _assert_equal(args, do, plan, 8, 2e-2)
  # One key block at a time, 32 of them: a bfloat16 running sum would drift.
  ones = jnp.ones_like(args[2])
  chain = jax.tree.map(
    jnp.asarray, layout.build(np.full((1, 256), 256, np.int32), 8)
  )
  o = attention.tree_attention(args[0], args[1], ones, chain, block=8)
  np.testing.assert_array_equal(np.asarray(o, np.float32), 1.0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_are_zero_beyond_the_ancestors(implementation):
  (q, k, v), _, plan = _inputs(3, B=1)
  seen_TT = np.asarray(reference.visible(plan))[0]

  def reach(query):
    def output(k, v):
      o = attention.tree_attention(
        q, k, v, plan, block=8, implementation=implementation
      )
      return o[0, query].sum()

    dk, dv = jax.grad(output, (0, 1))(k, v)
    return jnp.abs(dk[0]).sum((1, 2)), jnp.abs(dv[0]).sum((1, 2))

  dk_TT, dv_TT = jax.jit(lambda: jax.lax.map(reach, jnp.arange(48)))()
  assert (np.asarray(dk_TT)[~seen_TT] == 0).all()
  np.testing.assert_array_equal(np.asarray(dv_TT) > 0, seen_TT)


def test_under_checkpoint_scan_and_shard_map():
  args, _, plan = _inputs(4)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  spec = jax.sharding.PartitionSpec("data")

  def loss(args, implementation, wrap):
    def attend(q, k, v, plan):
      return attention.tree_attention(
        q, k, v, plan, block=8, implementation=implementation
      )

    if wrap:
      attend = jax.shard_map(
        attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
      )
    q, k, v = args

    @jax.checkpoint
    def layer(x, _):
      return attend(x, k, v, plan), None

    return (jax.lax.scan(layer, q, length=3)[0] ** 2).sum()

  got = jax.jit(jax.grad(lambda a: loss(a, "xla", True)))(args)
  want = jax.jit(jax.grad(lambda a: loss(a, "reference", False)))(args)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("name", "platform", "found"),
  [
    ("auto", "cpu", "xla"),
    ("auto", "tpu", "pallas_tpu"),
    ("auto", "gpu", "pallas_gpu"),
    ("auto", "another", "xla"),
    ("reference", "tpu", "reference"),
  ],
)
def test_auto_goes_by_the_platform(name, platform, found):
  assert attention.resolve(name, platform) == found


def test_misuse_is_refused_with_numbers():
  (q, k, v), _, plan = _inputs(5)
  attend = attention.tree_attention
  with pytest.raises(errors.ConfigError, match=r"'fast'; expected .*auto, ref"):
    attend(q, k, v, plan, block=8, implementation="fast")
  with pytest.raises(errors.ConfigError, match=r"6 blocks of 16.*48 tokens"):
    attend(q, k, v, plan, block=16)
  with pytest.raises(errors.ConfigError, match=r"2 key/value heads.*3 query"):
    attend(q[:, :, :3], k, v, plan, block=8)
  with pytest.raises(errors.ConfigError, match=r"\(2, 48\).*\(1, 48\)"):
    attend(q[:1], k[:1], v[:1], plan, block=8)
