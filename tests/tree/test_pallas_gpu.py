"""The GPU kernels: interpreted against the reference, and lowered for CUDA.

No GPU is needed: Pallas runs the kernels as plain JAX, and JAX lowers them for
a GPU that it knows by name only.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect
import numpy as np
import pytest

from experiments.benchmarks import gpu_attention
from forge_jax import errors, types
from forge_jax.tree import layout
from forge_jax.tree.attention import pallas_gpu, reference

BF16 = jnp.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend")


def _attend(q, k, v, plan, block):
  return pallas_gpu.attention(q, k, v, plan, block, interpret=True)


def _plan(end_BT, block):
  built = layout.build(np.asarray(end_BT, np.int32), block)
  return jax.tree.map(jnp.asarray, built)


def _random_end(rng, used, T):
  """subtree_end of a random forest of `used` tokens and padding up to T."""
  end_T = np.arange(1, T + 1)
  path = []
  for t in range(used):
    if rng.random() < 0.1:  # a branch: back to any ancestor, or a new root
      del path[rng.integers(len(path) + 1) :]
    path.append(t)
    end_T[path] = t + 1
  return end_T


def _inputs(seed, *, B=1, T=64, H=4, K=2, C=16, block=16, dtype=jnp.float32):
  """q, k, v, do and the plan of B forests with some padding."""
  rng = np.random.default_rng(seed)
  used = T - block // 2 - 3
  end_BT = np.stack([_random_end(rng, used, T) for _ in range(B)])
  arrays = (
    jnp.asarray(rng.normal(size=(B, T, X, C)), dtype) for X in (H, K, K, H)
  )
  return (*arrays, _plan(end_BT, block))


def _value_and_grads(attend, q, k, v, do):
  o, pull = jax.vjp(attend, q, k, v)
  return o, *pull(do)


def _both(q, k, v, do, plan, block):
  """Output and gradients of the kernels and of the reference, in pairs."""

  @jax.jit
  def run(plan, *args):
    attend = lambda q, k, v: _attend(q, k, v, plan, block)
    dense = lambda q, k, v: reference.attention(q, k, v, plan)
    return _value_and_grads(attend, *args), _value_and_grads(dense, *args)

  return list(zip(*run(plan, q, k, v, do), strict=True))


def _assert_equal(pairs, tolerance):
  for x, y in pairs:
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


@pytest.mark.parametrize(
  ("shape", "tolerance"),
  [
    ({"B": 2, "H": 3, "K": 1, "C": 20, "block": 32}, 1e-5),
    # Blocks of several tiles, unlike in queries and keys.
    ({"H": 2, "K": 2, "C": 64, "T": 256, "block": 128}, 1e-5),
    ({"B": 2, "H": 4, "K": 1, "T": 96, "block": 48, "dtype": BF16}, 2e-2),
    ({"H": 2, "K": 1, "C": 8, "dtype": jnp.float16}, 3e-3),
  ],
)
def test_values_and_gradients_equal_the_reference(shape, tolerance):
  pairs = _both(*_inputs(0, **shape), shape.get("block", 16))
  _assert_equal(pairs, tolerance)


@pytest.mark.parametrize("end", [31, 32, 33, 64])
def test_a_tile_is_whole_up_to_the_last_query_that_sees_it(end):
  # Tiles of 16: query tile 1 sees all of key tile 0 from end = 32 on.
  args = _inputs(1, H=2, K=1)[:4]
  chain = np.maximum(np.where(np.arange(64) < 20, end, 0), np.arange(1, 65))
  _assert_equal(_both(*args, _plan(chain[None], 16), 16), 1e-5)


def test_large_scores_neither_overflow_nor_lose_the_maximum():
  q, *rest = _inputs(2, H=2, K=1)
  pairs = _both(30 * q, *rest, 16)  # exp(score) would overflow
  assert all(np.isfinite(x).all() for x, _ in pairs)
  _assert_equal(pairs, 1e-4)


def test_one_trace_serves_every_tree():
  traces = 0

  @jax.jit
  def loss(q, k, v, plan):
    nonlocal traces
    traces += 1
    return _attend(q, k, v, plan, 16).sum()

  q, k, v, _, plan = _inputs(3, T=128, H=1, K=1)
  _, _, _, _, other = _inputs(4, T=128, H=1, K=1)
  assert plan.query_start[0, -1] != other.query_start[0, -1]
  values = [loss(q, k, v, p) for p in (plan, other)]
  wants = [reference.attention(q, k, v, p).sum() for p in (plan, other)]
  np.testing.assert_allclose(values, wants, rtol=1e-5)
  assert traces == 1


def test_rematerialisation_that_keeps_the_outputs_runs_no_kernel_twice():
  q, k, v, _, plan = _inputs(5)

  def kernels(policy):
    attend = jax.checkpoint(
      lambda q: _attend(q, k, v, plan, 16) * 2.0, policy=policy
    )
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: (attend(q) ** 2).sum()))(q)
    return str(jaxpr).count("pallas_call[")

  assert kernels(jax.checkpoint_policies.nothing_saveable) == 4
  keep = jax.checkpoint_policies.save_only_these_names("attention")
  assert kernels(keep) == 3


def test_under_scan_and_shard_map():
  q, k, v, _, plan = _inputs(6, B=2, H=2, K=1)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  spec = jax.sharding.PartitionSpec("data")
  attend = jax.shard_map(
    lambda q, k, v, plan: _attend(q, k, v, plan, 16),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )

  def loss(attend, q):
    layer = lambda x, _: (attend(x, k, v, plan), None)
    return (jax.lax.scan(layer, q, length=2)[0] ** 2).sum()

  got = jax.jit(jax.grad(lambda q: loss(attend, q)))(q)
  want = jax.jit(jax.grad(lambda q: loss(reference.attention, q)))(q)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_misuse_is_refused_with_numbers():
  q, k, v, _, plan = _inputs(7)
  with pytest.raises(errors.ConfigError, match="int32; expected bfloat16"):
    _attend(q.astype(jnp.int32), k, v, plan, 16)
  wide = jnp.zeros((1, 64, 1, 160))
  with pytest.raises(errors.ConfigError, match="160 channels; expected at m"):
    _attend(wide, wide, wide, plan, 16)
  with pytest.raises(errors.ConfigError, match="24 tokens; expected a"):
    _attend(q, k, v, plan, 24)


def _lower(kind, C, *, T=16384, dtype=jnp.bfloat16):
  """Forward and backward, Qwen3-0.6B's heads, lowered for a kind of GPU."""
  block, shape = 128, jax.ShapeDtypeStruct
  rows, pairs = (1, T // block + 1), (1, layout.plan_capacity(T, block))
  plan = types.TreeLayout(
    *(shape(x, jnp.int32) for x in ((1, T), rows, pairs, rows, pairs))
  )

  def both(plan, *args):
    return _value_and_grads(
      lambda q, k, v: pallas_gpu.attention(q, k, v, plan, block), *args
    )

  args = [shape((1, T, heads, C), dtype) for heads in (16, 8, 8, 16)]
  device = jax.sharding.AbstractDevice(
    device_kind=kind, num_cores=None, platform="gpu"
  )
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(both).trace(plan, *args)
    return traced.lower(lowering_platforms=("cuda",))


def _kernels(lowered):
  """The Triton module of each kernel, parsed and verified, by name."""
  found = {}

  def visit(operation):
    if operation.name == "stablehlo.custom_call":
      config = operation.attributes["mhlo.backend_config"]
      context = ir.Context()
      triton_dialect.register_dialect(context)
      context.load_all_available_dialects()
      with context:
        code = ir.StringAttr(config["ir"]).value_bytes
        module = ir.Module.parse(code)
        assert module.operation.verify()
        found[ir.StringAttr(config["name"]).value] = str(module)
    return ir.WalkResult.ADVANCE

  lowered.compiler_ir().operation.walk(visit)
  return found


def _largest(text):
  """Elements of the largest tensor named in an MLIR text."""
  shapes = re.findall(r"tensor<((?:\d+x)+)", text)
  return max(math.prod(map(int, x[:-1].split("x"))) for x in shapes)


@pytest.mark.parametrize("C", [64, 128])
@pytest.mark.parametrize(
  "kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"]
)
def test_lowers_for_cuda_in_memory_linear_in_tokens(kind, C):
  lowered = _lower(kind, C)
  kernels = _kernels(lowered)
  products = {name: text.count("tt.dot ") for name, text in kernels.items()}
  assert products == {"_forward_kernel": 2, "_dq_kernel": 3, "_dkv_kernel": 4}
  # Nothing outside is larger than q, inside than a tile.
  assert _largest(lowered.as_text()) == 16384 * 16 * C
  assert max(map(_largest, kernels.values())) <= 128 * 128
  for text in kernels.values():
    assert text.count("scf.for") == 1
    assert text.count("scf.if") == 1  # a tile pair that needs no mask
    assert "xbf16> -> tensor<" in text
    assert not re.search(r"tt.dot .*-> tensor<[x0-9]*bf16>", text)


def test_float32_products_follow_jax_default_matmul_precision():
  def precisions():
    text = "".join(
      _kernels(_lower("NVIDIA H100", 64, dtype=jnp.float32)).values()
    )
    return re.findall(r"tt.dot .*?(tf32)? :", text)

  assert set(precisions()) == {"tf32"}
  with jax.default_matmul_precision("highest"):
    assert set(precisions()) == {""}


def test_the_benchmark_counts_compares_and_tabulates():
  heads = gpu_attention.Heads(query=2, key=1, channels=16, block=32)
  for make in gpu_attention.TREES.values():
    end_T = make(512)
    seen = reference.visible(layout.build(end_T[None], 32))
    assert gpu_attention.visible_pairs(end_T) == int(seen.sum())
  runs = gpu_attention.attends(heads, causal="xla", interpret=True)
  assert gpu_attention.largest_error(runs, heads, 64) < 2e-2
  rows = gpu_attention.compare(runs, 64, heads, 1)
  assert [(row["tree"], row["implementation"]) for row in rows] == [
    ("chain", "causal"),
    *itertools.product(("chain", "rollouts"), ("pallas_gpu", "xla")),
  ]
  assert rows[0]["both_of_causal"] == 1.0
  for row in rows:
    work = row["both_ms"] * row["both_tflops"] / row["forward_ms"]
    assert work == pytest.approx(3.5 * row["forward_tflops"])
