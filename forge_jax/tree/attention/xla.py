"""Block-sparse tree attention in plain XLA, forward and backward.

Flash attention (Dao, arXiv 2307.08691) over the layout's block plan: only
visible (query block, key block) pairs are computed, by loops whose trip
counts are data, so one compilation serves every tree of a shape.

Forward, per query block: over its key blocks, keep a running maximum m, sum
and output; save the log-sum-exp L. Backward, per key block: over its query
blocks, recompute p = exp(s - L) and accumulate dv = p^T do, ds = p (do v^T -
delta) with delta = rowsum(do o), dk = ds^T q, dq = ds k.

Inside, arrays are [T/block, K, G * block, C] for queries and [T/block, K,
block, C] for keys: the G query heads of a key head are rows of one matrix, so
keys are never repeated and each product is one batched matmul.
"""

from functools import partial

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from forge_jax import types

_HIDDEN = -1e30  # finite, so that a row hidden so far stays free of NaN


def attention(
  q_BTHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  layout: types.TreeLayout,
  block: int,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `tree_attention`."""
  del interpret  # there is no kernel to interpret
  arrays = (q_BTHC, k_BTKC, v_BTKC, layout)
  if q_BTHC.shape[0] == 1:  # spares the loop
    q, k, v, one = jax.tree.map(lambda x: x[0], arrays)
    return _attention(q, k, v, one, block)[None]
  return lax.map(lambda args: _attention(*args, block), arrays)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_THC, k_TKC, v_TKC, layout, block):
  return _forward(q_THC, k_TKC, v_TKC, layout, block)[0]


def _split(x_TXC, kv_heads, block):
  """[T, K * G, C] -> [T/block, K, G * block, C]."""
  T, X, C = x_TXC.shape
  x = x_TXC.reshape(T // block, block, kv_heads, X // kv_heads, C)
  return x.transpose(0, 2, 3, 1, 4).reshape(T // block, kv_heads, -1, C)


def _join(x, block):
  """[T/block, K, G * block, C] -> [T, K * G, C]."""
  blocks, kv_heads, rows, C = x.shape
  x = x.reshape(blocks, kv_heads, rows // block, block, C)
  return x.transpose(0, 3, 1, 2, 4).reshape(blocks * block, -1, C)


def _at(x, i):
  return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x, value, i):
  return lax.dynamic_update_index_in_dim(x, value, i, 0)


def _dot(a, b, contract, wide):
  """Batched matmul over axis 0, contracting one axis of each."""
  dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
  return lax.dot_general(a, b, dims, preferred_element_type=wide)


def _scores(q, k, i, j, end_T, wide):
  """Scaled, masked scores [K, G * block, block] of query block i, keys j."""
  block = k.shape[1]
  s = _dot(q, k, (2, 2), wide) * (q.shape[-1] ** -0.5)
  query = i * block + jnp.arange(block)
  key = j * block + jnp.arange(block)
  end = lax.dynamic_slice_in_dim(end_T, j * block, block)
  mask = (key[None, :] <= query[:, None]) & (query[:, None] < end[None, :])
  s = s.reshape(s.shape[0], -1, block, block)
  s = jnp.where(mask[None, None], s, _HIDDEN)
  return s.reshape(s.shape[0], -1, block)


def _forward(q_THC, k_TKC, v_TKC, layout: types.TreeLayout, block):
  wide = jnp.promote_types(q_THC.dtype, jnp.float32)
  kv_heads = k_TKC.shape[1]
  q = _split(q_THC, kv_heads, block)
  k, v = _split(k_TKC, kv_heads, block), _split(v_TKC, kv_heads, block)
  rows = q.shape[1:3]

  def query_block(i, carry):
    out, lse = carry
    q_i = _at(q, i)

    def key_block(n, carry):
      o, m, total = carry
      j = layout.key_block[n]
      s = _scores(q_i, _at(k, j), i, j, layout.subtree_end_BT, wide)
      m_new = jnp.maximum(m, s.max(-1))
      p = jnp.exp(s - m_new[..., None])
      shrink = jnp.exp(m - m_new)
      o = o * shrink[..., None]
      o = o + _dot(p.astype(v.dtype), _at(v, j), (2, 1), wide)
      return o, m_new, total * shrink + p.sum(-1)

    start = (
      jnp.zeros(q.shape[1:], wide),
      jnp.full(rows, _HIDDEN, wide),
      jnp.zeros(rows, wide),
    )
    first, stop = layout.query_start[i], layout.query_start[i + 1]
    o, m, total = lax.fori_loop(first, stop, key_block, start)
    o = (o / total[..., None]).astype(q.dtype)
    return _put(out, o, i), _put(lse, m + jnp.log(total), i)

  start = jnp.zeros_like(q), jnp.zeros(q.shape[:3], wide)
  out, lse = lax.fori_loop(0, q.shape[0], query_block, start)
  # Named so that rematerialisation can keep both and skip this loop.
  out_THC = checkpoint_name(_join(out, block), "attention")
  lse = checkpoint_name(lse, "attention")
  return out_THC, (q_THC, k_TKC, v_TKC, layout, out_THC, lse)


def _backward(block, residuals, do_THC):
  q_THC, k_TKC, v_TKC, layout, out_THC, lse = residuals
  wide = lse.dtype
  kv_heads = k_TKC.shape[1]
  q, do = _split(q_THC, kv_heads, block), _split(do_THC, kv_heads, block)
  k, v = _split(k_TKC, kv_heads, block), _split(v_TKC, kv_heads, block)
  out = _split(out_THC, kv_heads, block)
  delta = (do.astype(wide) * out.astype(wide)).sum(-1)

  def key_block(j, carry):
    dq, dk_all, dv_all = carry
    k_j, v_j = _at(k, j), _at(v, j)

    def query_block(n, carry):
      dq, dk, dv = carry
      i = layout.query_block[n]
      q_i, do_i = _at(q, i), _at(do, i)
      s = _scores(q_i, k_j, i, j, layout.subtree_end_BT, wide)
      p = jnp.exp(s - _at(lse, i)[..., None])
      dp = _dot(do_i, v_j, (2, 2), wide)
      ds = (p * (dp - _at(delta, i)[..., None])).astype(q.dtype)
      dv = dv + _dot(p.astype(q.dtype), do_i, (1, 1), wide)
      dk = dk + _dot(ds, q_i, (1, 1), wide)
      dq = _put(dq, _at(dq, i) + _dot(ds, k_j, (2, 1), wide), i)
      return dq, dk, dv

    zero = jnp.zeros(k_j.shape, wide)
    first, stop = layout.key_start[j], layout.key_start[j + 1]
    dq, dk, dv = lax.fori_loop(first, stop, query_block, (dq, zero, zero))
    return dq, _put(dk_all, dk, j), _put(dv_all, dv, j)

  start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
  dq, dk, dv = lax.fori_loop(0, k.shape[0], key_block, start)
  scale = q.shape[-1] ** -0.5
  return (
    _join(dq * scale, block).astype(q.dtype),
    _join(dk * scale, block).astype(k.dtype),
    _join(dv, block).astype(v.dtype),
    jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), layout),
  )


_attention.defvjp(_forward, _backward)
