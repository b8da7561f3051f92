"""Block-sparse tree attention for GPUs, in Pallas with the Triton backend.

Flash attention (Dao, arXiv 2307.08691) over the layout's block plan, forward
and backward. Every program owns one tile of the output and walks the row of
the plan that its tile lies in, so trip counts are data, one compilation serves
every tree of a shape, and nothing is added atomically:

  forward  a query tile of a head: running maximum m, sum and output; saves
           the base-2 log-sum-exp L
  dq       a query tile of a head: p = 2^(s - L), ds = p (do v^T - delta),
           dq = ds k, with delta = rowsum(do o)
  dk, dv   a key tile of a key head, over the G query heads that read it: the
           same transposed, so that p^T and ds^T are left operands, which the
           tensor cores take from registers

K and V are never repeated and never held whole: programs load tiles of the
[B, T, heads, C] arrays as they stand. The mask is computed from the subtree
ends; a tile pair that is wholly visible (its keys lie before its queries and
the least of their ends lies after) skips it.

The plan's block is the granularity of the lists, the tile that of the work
(gpu_tiles.py); blocks of 128 fit all tiles. Products of float32 are made in
TF32, as JAX's matmuls on GPUs are, unless jax_default_matmul_precision asks for
more.

Triton and not Mosaic GPU, because one source then serves A100 and Hopper and
runs in interpret mode without a GPU; Mosaic GPU would add Hopper's bulk copies
and warp specialisation. JAX calls its Triton backend deprecated; the version
in constraints.txt has it.
"""

import dataclasses
from functools import partial
import math

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp
import numpy as np

from forge_jax import errors, types
from forge_jax.tree.attention import gpu_tiles

_HIDDEN = -1e30  # score of an invisible key; its weight is 0, because
_LEAST_MAXIMUM = -1e20  # running maxima start here, far above
_LOG2_E = math.log2(math.e)
_LEAST_SIDE = 16  # of a matrix product in Triton


@dataclasses.dataclass(frozen=True)
class _Options:
  """What the kernels are built for, beside their operands' shapes."""

  block: int  # tokens of a block of the plan
  scale: float  # of the scores
  interpret: bool

  def tile(self, kernel: str, q_BTHC: jax.Array) -> gpu_tiles.Tile:
    C, width = q_BTHC.shape[-1], q_BTHC.dtype.itemsize
    return gpu_tiles.tile(kernel, C, width).within(self.block)

  def call(self, kernel, tile: gpu_tiles.Tile, **arguments):
    params = plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(
      partial(kernel, tile=tile, options=self),
      compiler_params=params,
      interpret=self.interpret,
      **arguments,
    )


def attention(
  q_BTHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  layout: types.TreeLayout,
  block: int,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `tree_attention`.

  Args:
    q_BTHC: bfloat16, float16 or float32; C at most 128. Heads whose C is not
      a power of two are padded to one.
    k_BTKC: of q's dtype.
    v_BTKC: of q's dtype.
    layout: of the same B and T.
    block: tokens of a block, as the layout was built: a multiple of 16.
    interpret: run the kernels as plain JAX, on any backend.

  Returns:
    o_BTHC, of q's dtype.

  Raises:
    ConfigError: a dtype, head size or block that the kernels do not do.
  """
  C = q_BTHC.shape[-1]
  _check(q_BTHC.dtype, C, block)
  extra = max(_LEAST_SIDE, pl.next_power_of_2(C)) - C
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)))
    for x in (q_BTHC, k_BTKC, v_BTKC)
  )
  options = _Options(block, C**-0.5, interpret)
  return _attention(q, k, v, layout, options)[..., :C]


def _check(dtype, channels: int, block: int) -> None:
  if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise errors.ConfigError(
      f"tree attention pallas_gpu does not do {dtype}; expected bfloat16, "
      "float16 or float32"
    )
  if channels > gpu_tiles.MOST_CHANNELS:
    raise errors.ConfigError(
      f"tree attention pallas_gpu does not do heads of {channels} channels; "
      f"expected at most {gpu_tiles.MOST_CHANNELS}"
    )
  if block % _LEAST_SIDE:
    raise errors.ConfigError(
      f"tree attention pallas_gpu does not do blocks of {block} tokens; "
      f"expected a multiple of {_LEAST_SIDE}, best of 128"
    )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BTHC, k_BTKC, v_BTKC, layout, options):
  return _forward(q_BTHC, k_BTKC, v_BTKC, layout, options)[0]


def _visible_scores(s, query_0, key_0, end, least_end, *, query_axis):
  """Scores of a tile pair, those of invisible keys replaced.

  Args:
    s: float32, queries along `query_axis`, keys along the other axis.
    query_0: index of the tile's first query.
    key_0: index of the tile's first key.
    end: int32, the subtree ends of the tile's keys.
    least_end: their minimum.
    query_axis: 0 or 1.
  """
  queries, keys = s.shape[query_axis], s.shape[1 - query_axis]

  def hide():
    query = query_0 + lax.broadcasted_iota(jnp.int32, s.shape, query_axis)
    key = key_0 + lax.broadcasted_iota(jnp.int32, s.shape, 1 - query_axis)
    ends = lax.broadcast_in_dim(end, s.shape, (1 - query_axis,))
    return jnp.where((key <= query) & (query < ends), s, _HIDDEN)

  before = key_0 + keys <= query_0 + 1
  return lax.cond(before & (query_0 + queries <= least_end), lambda: s, hide)


def _divmod(n, by: int):
  """Quotient and remainder of an int32 that is not negative."""
  return lax.div(n, np.int32(by)), lax.rem(n, np.int32(by))


def _row(start, token, tile_tokens, block):
  """First and stop entry of the plan's row of `token`, counted in tiles."""
  row, ratio = _divmod(token, block)[0], block // tile_tokens
  return start[row] * ratio, start[row + 1] * ratio


def _first_token(blocks, n, tile_tokens, block):
  """First token of the n-th tile of a list of blocks."""
  entry, tile = _divmod(n, block // tile_tokens)
  return blocks[entry] * block + tile * tile_tokens


def _key_tile(lists, n, tile, block):
  """First key of the n-th key tile of a plan, its slice, ends, least end."""
  _, key_block, end, least_end = lists
  key_0 = _first_token(key_block, n, tile.keys, block)
  here = pl.ds(key_0, tile.keys)
  return key_0, here, end[here], least_end[_divmod(key_0, tile.keys)[0]]


def _forward_kernel(lists, q, k, v, o, lse, *, tile, options):
  block, factor = options.block, options.scale * _LOG2_E
  query_0 = _last_first() * tile.queries
  q_tile = q[...]

  def key_tile(n, carry):
    out, m, total = carry
    key_0, here, end, least = _key_tile(lists, n, tile, block)
    s = plt.dot(q_tile, k[here, :], trans_b=True)
    s = _visible_scores(s, query_0, key_0, end, least, query_axis=0)
    m_new = jnp.maximum(m, s.max(-1) * factor)
    p = jnp.exp2(s * factor - m_new[:, None])
    shrink = jnp.exp2(m - m_new)
    out = out * shrink[:, None] + plt.dot(p.astype(v.dtype), v[here, :])
    return out, m_new, total * shrink + p.sum(-1)

  carry = (
    jnp.zeros(q_tile.shape, jnp.float32),
    jnp.full((tile.queries,), _LEAST_MAXIMUM, jnp.float32),
    jnp.zeros((tile.queries,), jnp.float32),
  )
  first, stop = _row(lists[0], query_0, tile.keys, block)
  out, m, total = lax.fori_loop(first, stop, key_tile, carry)
  o[...] = (out / total[:, None]).astype(o.dtype)
  lse[...] = m + jnp.log2(total)


def _dq_kernel(lists, q, k, v, do, lse, delta, dq, *, tile, options):
  block, factor = options.block, options.scale * _LOG2_E
  query_0 = _last_first() * tile.queries
  q_tile, do_tile = q[...], do[...]
  lse_tile, delta_tile = lse[...][:, None], delta[...][:, None]

  def key_tile(n, total):
    key_0, here, end, least = _key_tile(lists, n, tile, block)
    k_tile = k[here, :]
    s = plt.dot(q_tile, k_tile, trans_b=True)
    s = _visible_scores(s, query_0, key_0, end, least, query_axis=0)
    p = jnp.exp2(s * factor - lse_tile)
    ds = p * (plt.dot(do_tile, v[here, :], trans_b=True) - delta_tile)
    return total + plt.dot(ds.astype(k.dtype), k_tile)

  first, stop = _row(lists[0], query_0, tile.keys, block)
  zero = jnp.zeros(q_tile.shape, jnp.float32)
  total = lax.fori_loop(first, stop, key_tile, zero)
  dq[...] = (total * options.scale).astype(dq.dtype)


def _dkv_kernel(lists, q, k, v, do, lse, delta, dk, dv, *, tile, options):
  start, query_block, end = lists
  block, factor = options.block, options.scale * _LOG2_E
  key_0 = pl.program_id(0) * tile.keys
  k_tile, v_tile, end_tile = k[...], v[...], end[...]
  least = end_tile.min()
  first, stop = _row(start, key_0, tile.queries, block)
  tiles = stop - first  # of each of the G query heads

  def query_tile(n, carry):
    dk_sum, dv_sum = carry
    g, n = lax.div(n, tiles), first + lax.rem(n, tiles)
    query_0 = _first_token(query_block, n, tile.queries, block)
    here = pl.ds(query_0, tile.queries)
    q_tile, do_tile = q[here, g, :], do[here, g, :]
    s = plt.dot(k_tile, q_tile, trans_b=True)
    s = _visible_scores(s, query_0, key_0, end_tile, least, query_axis=1)
    p = jnp.exp2(s * factor - lse[g, here][None, :])
    dv_sum = dv_sum + plt.dot(p.astype(do.dtype), do_tile)
    dp = plt.dot(v_tile, do_tile, trans_b=True)
    ds = p * (dp - delta[g, here][None, :])
    return dk_sum + plt.dot(ds.astype(q.dtype), q_tile), dv_sum

  zero = jnp.zeros(k_tile.shape, jnp.float32)
  steps = q.shape[1] * tiles
  dk_sum, dv_sum = lax.fori_loop(0, steps, query_tile, (zero, zero))
  dk[...] = (dk_sum * options.scale).astype(dk.dtype)
  dv[...] = dv_sum.astype(dv.dtype)


def _last_first():
  """The query tile of a program: the last, which see most keys, go first."""
  return pl.num_programs(0) - 1 - pl.program_id(0)


def _pack(x):
  """Spec of one pack's row of a [B, width] array."""
  return pl.BlockSpec((None, x.shape[1]), lambda i, h, b: (b, 0))


def _query_operands(q_BTHC, k_BTKC, layout, tile):
  """Grid, operands and specs of a kernel whose programs own query tiles.

  Returns:
    The grid; the lists that come first and their specs; the specs of a query
    tile, of a key head, and of one number a query.
  """
  B, T, H, C = q_BTHC.shape
  end, groups = layout.subtree_end_BT, H // k_BTKC.shape[2]
  last = T // tile.queries - 1
  least_end = end.reshape(B, T // tile.keys, tile.keys).min(-1)
  lists = (layout.query_start, layout.key_block, end, least_end)
  return (
    (last + 1, H, B),
    lists,
    tuple(_pack(x) for x in lists),
    pl.BlockSpec(
      (None, tile.queries, None, C), lambda i, h, b: (b, last - i, h, 0)
    ),
    pl.BlockSpec(
      (None, T, None, C), lambda i, h, b: (b, 0, _divmod(h, groups)[0], 0)
    ),
    pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, last - i)),
  )


def _forward(q_BTHC, k_BTKC, v_BTKC, layout: types.TreeLayout, options):
  B, T, H, _ = q_BTHC.shape
  tile = options.tile("forward", q_BTHC)
  grid, lists, list_specs, query, key, number = _query_operands(
    q_BTHC, k_BTKC, layout, tile
  )
  o_BTHC, lse_BHT = options.call(
    _forward_kernel,
    tile,
    grid=grid,
    in_specs=[list_specs, query, key, key],
    out_specs=[query, number],
    out_shape=[
      jax.ShapeDtypeStruct(q_BTHC.shape, q_BTHC.dtype),
      jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    ],
  )(lists, q_BTHC, k_BTKC, v_BTKC)
  # Named so that rematerialisation can keep both and skip this kernel.
  o_BTHC = checkpoint_name(o_BTHC, "attention")
  lse_BHT = checkpoint_name(lse_BHT, "attention")
  return o_BTHC, (q_BTHC, k_BTKC, v_BTKC, layout, o_BTHC, lse_BHT)


def _backward(options, residuals, do_BTHC):
  q_BTHC, k_BTKC, v_BTKC, layout, o_BTHC, lse_BHT = residuals
  delta_BTH = (do_BTHC.astype(jnp.float32) * o_BTHC).sum(-1)
  operands = (
    *(q_BTHC, k_BTKC, v_BTKC, do_BTHC),
    *(lse_BHT, delta_BTH.transpose(0, 2, 1)),
  )
  dk_BTKC, dv_BTKC = _backward_keys(operands, layout, options)
  return (
    _backward_queries(operands, layout, options),
    dk_BTKC,
    dv_BTKC,
    jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), layout),
  )


def _backward_queries(operands, layout, options):
  q_BTHC, k_BTKC = operands[:2]
  tile = options.tile("dq", q_BTHC)
  grid, lists, list_specs, query, key, number = _query_operands(
    q_BTHC, k_BTKC, layout, tile
  )
  return options.call(
    _dq_kernel,
    tile,
    grid=grid,
    in_specs=[list_specs, query, key, key, query, number, number],
    out_specs=query,
    out_shape=jax.ShapeDtypeStruct(q_BTHC.shape, q_BTHC.dtype),
  )(lists, *operands)


def _backward_keys(operands, layout, options):
  q_BTHC, k_BTKC = operands[:2]
  tile = options.tile("dkv", q_BTHC)
  B, T, K, C = k_BTKC.shape
  groups = q_BTHC.shape[2] // K
  start, query_block = layout.key_start, layout.query_block
  query = pl.BlockSpec((None, T, groups, C), lambda i, h, b: (b, 0, h, 0))
  number = pl.BlockSpec((None, groups, T), lambda i, h, b: (b, h, 0))
  key = pl.BlockSpec((None, tile.keys, None, C), lambda i, h, b: (b, i, h, 0))
  end = pl.BlockSpec((None, tile.keys), lambda i, h, b: (b, i))
  return options.call(
    _dkv_kernel,
    tile,
    grid=(T // tile.keys, K, B),
    in_specs=[
      (_pack(start), _pack(query_block), end),
      *(query, key, key, query, number, number),
    ],
    out_specs=[key, key],
    out_shape=[jax.ShapeDtypeStruct(k_BTKC.shape, k_BTKC.dtype)] * 2,
  )((start, query_block, layout.subtree_end_BT), *operands)


_attention.defvjp(_forward, _backward)
