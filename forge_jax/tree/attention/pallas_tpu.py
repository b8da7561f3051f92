"""Block-sparse tree attention for TPUs: two Pallas (Mosaic) kernels.

Flash attention (Dao, arXiv 2307.08691) over the layout's block plan. A kernel's
grid is (key head, block pair); its second size is the number of visible pairs,
which is data: a tree pays for the pairs it has, and one compilation serves all
trees of a shape. Scalar memory holds the list of pairs, from which each step's
blocks are fetched while the step before is computed.

Forward, pairs by query block: keep a running maximum, sum and output; write the
output and the log-sum-exp at a query block's last pair. Backward, pairs by key
block: dk and dv are summed on chip; dq, which the order scatters, is added to
in device memory by copies that overlap the step's matrix products. One backward
kernel makes five products a pair, where one kernel for dq and one for dk and dv
would make seven.

The G query heads of a key head share a step, so keys are fetched once and never
repeated. The forward kernel keeps queries in rows and keys in lanes, which
feeds the matrix units best; the backward kernel has it the other way round, so
that no matrix of the size of the scores is ever transposed.

The mask is computed from the key block's slice of subtree ends, and only where
a pair is not visible as a whole. Splash attention reads masks of partly visible
blocks from memory instead. Where history is rewritten nearly every block is
partial, and a pack of 65,536 tokens has up to 8,256 pairs of blocks of 512:
2.2 GB of int8 masks for the forward kernel and as much for the backward one.

Packs are laid side by side, so that B packs of T tokens are one forest of B * T
tokens. Inside, queries are [K, G, B * T, C], keys and values [K, B * T, C], and
the log-sum-exp is [K, G, B * T] in base 2: the chip computes powers of 2, so
the scale of the scores and log2(e) are one factor.
"""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from forge_jax import errors, types
from forge_jax.tree.attention import pallas_tpu_kernels as kernels

# Scalar memory is 1 MiB on every TPU since v4; the compiler keeps some of it.
_SCALAR_BYTES = 960 * 1024
_VECTOR_BYTES = 48 * 1024 * 1024  # of the 64 MiB of a v5p core, the smallest


def attention(
  q_BTHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  layout: types.TreeLayout,
  block: int,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """See `tree_attention`; float32 products are made in full precision.

  Args:
    q_BTHC: queries, bfloat16 or float32.
    k_BTKC: keys, of q's dtype.
    v_BTKC: values, as the keys.
    layout: of the same B and T.
    block: tokens of a block, a multiple of 128; 512 keeps the chip busiest.
    interpret: run on the CPU, slowly, as `pallas_call` understands it.

  Raises:
    ConfigError: a dtype, head size or block that the kernels do not do; more
      pairs than scalar memory holds.
  """
  _check(q_BTHC, layout, block)
  return _attention(q_BTHC, k_BTKC, v_BTKC, layout, block, interpret)


def _check(q_BTHC: jax.Array, layout: types.TreeLayout, block: int) -> None:
  if q_BTHC.dtype not in (jnp.bfloat16, jnp.float32):
    raise errors.ConfigError(
      f"attention on TPU takes bfloat16 or float32, not {q_BTHC.dtype}"
    )
  if q_BTHC.shape[3] not in (64, 128):
    raise errors.ConfigError(
      f"attention on TPU takes heads of 64 or 128 channels, not "
      f"{q_BTHC.shape[3]}"
    )
  if block % kernels.LANES:
    raise errors.ConfigError(
      f"attention on TPU takes blocks of a multiple of {kernels.LANES} "
      f"tokens, not {block}"
    )
  B, T = q_BTHC.shape[:2]
  size = 4 * (layout.key_block.size + 2 * layout.query_start.size)
  if size > _SCALAR_BYTES:
    fits = (
      b
      for b in range(block, T + 1, kernels.LANES)
      if T % b == 0 and _scalar_bytes(B, T, b) <= _SCALAR_BYTES
    )
    raise errors.ConfigError(
      f"the block pairs of {B} packs of {T} tokens in blocks of {block} take "
      f"{size} bytes of a TPU's scalar memory, which has room for "
      f"{_SCALAR_BYTES}; block={next(fits, T)} fits"
    )


def _scalar_bytes(packs: int, tokens: int, block: int) -> int:
  """Bytes of the scalars of `_plan` for a layout of these sizes."""
  blocks = tokens // block
  return 4 * packs * (blocks * (blocks + 1) // 2 + 2 * (blocks + 1))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q_BTHC, k_BTKC, v_BTKC, layout, block, interpret):
  return _forward(q_BTHC, k_BTKC, v_BTKC, layout, block, interpret)[0]


def _split(x_BTXC: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, K * G, C] -> [K, G, B * T, C]."""
  B, T, _, C = x_BTXC.shape
  return x_BTXC.reshape(B * T, kv_heads, -1, C).transpose(1, 2, 0, 3)


def _join(x: jax.Array, packs: int) -> jax.Array:
  """[K, G, B * T, C] -> [B, T, K * G, C]."""
  C = x.shape[-1]
  return x.transpose(2, 0, 1, 3).reshape(packs, -1, x.shape[0] * x.shape[1], C)


def _plan(start, other, end_BT, block) -> tuple[jax.Array, ...]:
  """What the kernels keep in scalar memory, and the subtree ends.

  Args:
    start: int32 [B, T/block + 1], row pointers of the packs.
    other: int32 [B, N], the block that each pair has beside its row's.
    end_BT: int32, subtree ends within a pack.
    block: tokens of a block.

  Returns:
    Of the packs side by side: row pointers [B * T/block + 1]; pairs [B * N],
    see `kernels.pair`, of which the last row pointer says how many are real;
    the lowest subtree end of each block [B * T/block]; ends [1, B * T].
  """
  B, T = end_BT.shape
  pairs = other.shape[1]
  counts = jnp.diff(start, axis=1).reshape(-1)
  rows = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])
  rows = rows.astype(jnp.int32)
  n = jnp.arange(B * pairs, dtype=jnp.int32)
  row = (rows[None, 1:] <= n[:, None]).sum(1, dtype=jnp.int32)
  first = row // (T // block) * (T // block)  # of the row's pack
  at = n - rows[first] + first // (T // block) * pairs
  other = other.reshape(-1)[jnp.minimum(at, B * pairs - 1)] + first
  end_BT = end_BT + T * jnp.arange(B, dtype=jnp.int32)[:, None]
  lowest = end_BT.reshape(-1, block).min(1)
  return rows, kernels.pair(row, other), lowest, end_BT.reshape(1, -1)


def _specs(heads, block, C, query_of, key_of):
  """Block specs: of queries, their figures, keys and subtree ends.

  Args:
    heads: query heads G of a key head.
    block: tokens of a block.
    C: channels.
    query_of: finds the query block in a pair.
    key_of: finds the key block in a pair.
  """

  def spec(shape, index):
    return pl.BlockSpec(
      shape, lambda h, n, rows, pairs, lowest: index(h, pairs[n])
    )

  return (
    spec((None, heads, block, C), lambda h, pair: (h, 0, query_of(pair), 0)),
    spec((None, heads, block), lambda h, pair: (h, 0, query_of(pair))),
    spec((None, block, C), lambda h, pair: (h, key_of(pair), 0)),
    spec((1, block), lambda h, pair: (0, key_of(pair))),
  )


def _call(kernel, plan, inputs, in_specs, out, scratch, interpret, **kwargs):
  """Runs a kernel over (key heads, real pairs).

  Args:
    kernel: its references: the scalars, end, inputs, outputs, scratch.
    plan: see `_plan`.
    inputs: arrays; the second has a leading axis K.
    in_specs: block specs of the subtree ends and of the inputs.
    out: pairs of shape and block spec.
    scratch: what outlives a step, allocated in vector memory.
    interpret: see `attention`.
    **kwargs: further arguments of `pallas_call`.
  """
  rows, pairs, lowest, end = plan
  shapes, out_specs = zip(*out, strict=True)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(inputs[1].shape[0], rows[-1]),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      # Key heads may be shared out between the two cores of a chip.
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=_VECTOR_BYTES,
    ),
    interpret=interpret,
    **kwargs,
  )(rows, pairs, lowest, end, *inputs)


def _forward(q_BTHC, k_BTKC, v_BTKC, layout, block, interpret):
  kv_heads, C = k_BTKC.shape[2:]
  plan = _plan(
    layout.query_start, layout.key_block, layout.subtree_end_BT, block
  )
  q = _split(q_BTHC, kv_heads)
  k, v = (_split(x, kv_heads)[:, 0] for x in (k_BTKC, v_BTKC))
  heads = q.shape[1]
  of_q, of_row, of_k, of_end = _specs(
    heads, block, C, kernels.row_of, kernels.other_of
  )
  o, lse = _call(
    kernels.forward,
    plan,
    (q, k, v),
    (of_end, of_q, of_k, of_k),
    (
      (jax.ShapeDtypeStruct(q.shape, q.dtype), of_q),
      (jax.ShapeDtypeStruct(q.shape[:3], jnp.float32), of_row),
    ),
    [
      pltpu.VMEM((heads, block, width), jnp.float32)
      for width in (C, kernels.LANES, kernels.LANES)
    ],
    interpret,
    name="tree_attention_forward",
  )
  # Named so that rematerialisation can keep both and skip the kernel.
  o_BTHC = checkpoint_name(_join(o, q_BTHC.shape[0]), "attention")
  lse = checkpoint_name(lse, "attention")
  return o_BTHC, (q_BTHC, k_BTKC, v_BTKC, layout, o_BTHC, lse)


def _backward(block, interpret, residuals, do_BTHC):
  q_BTHC, k_BTKC, v_BTKC, layout, o_BTHC, lse = residuals
  packs, _, kv_heads, C = k_BTKC.shape
  plan = _plan(
    layout.key_start, layout.query_block, layout.subtree_end_BT, block
  )
  q, do = _split(q_BTHC, kv_heads), _split(do_BTHC, kv_heads)
  k, v = (_split(x, kv_heads)[:, 0] for x in (k_BTKC, v_BTKC))
  delta_BTH = (do_BTHC.astype(jnp.float32) * o_BTHC).sum(-1)
  delta = _split(delta_BTH[..., None], kv_heads)[..., 0]
  heads = q.shape[1]
  of_q, of_row, of_k, of_end = _specs(
    heads, block, C, kernels.other_of, kernels.row_of
  )
  whole = pl.BlockSpec(memory_space=pltpu.HBM)
  dq_shape = (*q.shape[:2], C, q.shape[2])
  dk, dv, dq = _call(
    kernels.backward,
    plan,
    (q, k, v, do, lse, delta, jnp.zeros(dq_shape, jnp.float32)),
    (of_end, of_q, of_k, of_k, of_q, of_row, of_row, whole),
    (
      (jax.ShapeDtypeStruct(k.shape, k.dtype), of_k),
      (jax.ShapeDtypeStruct(v.shape, v.dtype), of_k),
      (jax.ShapeDtypeStruct(dq_shape, jnp.float32), whole),
    ),
    [
      pltpu.VMEM((block, C), jnp.float32),
      pltpu.VMEM((block, C), jnp.float32),
      pltpu.VMEM((heads, C, block), jnp.float32),
      pltpu.VMEM((2, heads, C, block), jnp.float32),
      pltpu.SemaphoreType.DMA,
      pltpu.SemaphoreType.DMA,
    ],
    interpret,
    name="tree_attention_backward",
    input_output_aliases={10: 2},  # the zeros, after plan and six arrays: dq
  )
  dq = (dq * C**-0.5).astype(q.dtype).swapaxes(2, 3)
  return (
    _join(dq, packs),
    _join(dk[:, None], packs),
    _join(dv[:, None], packs),
    jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), layout),
  )


_attention.defvjp(_forward, _backward)
