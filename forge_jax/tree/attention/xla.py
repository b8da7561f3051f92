"""Block-sparse tree attention in plain XLA, forward and backward.

Flash attention (Dao, arXiv 2307.08691) over the layout's block plan: only
visible (query block, key block) pairs are computed, by loops whose trip
counts are data, so one compilation serves every tree of a shape.

Both passes go over the query blocks and, for each, over its key blocks, a few
at a time: visible key blocks need not be neighbours, so they are copied side
by side and then are one matrix. Forward: keep a running maximum m, sum and
output; save the log-sum-exp L. Backward: recompute p = exp(s - L), then
ds = p (do v^T - delta) with delta = rowsum(do o), dv += p^T do, dk += ds^T q,
dq += ds k.

The rows of a block are the queries of the G heads that share a key head, so
keys are never repeated. The backward pass holds scores transposed, [K, keys,
rows], since no product then contracts the major axis of a large operand, which
a CPU would have to transpose first. In memory a block is one contiguous row of
[K, T/block, rows * C], so that taking it is one copy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from forge_jax import types

_HIDDEN = -1e30  # finite, so that a row hidden so far stays free of NaN
# Key blocks taken at a time: at most so many keys that the scores of some
# heads stay in a core's cache, and so many blocks that compiling stays quick.
_KEYS, _BLOCKS = 512, 8


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


def _forward(q_THC, k_TKC, v_TKC, layout: types.TreeLayout, block):
  wide = jnp.promote_types(q_THC.dtype, jnp.float32)
  kv_heads, channels = k_TKC.shape[1:]
  q, k, v = (_split(x, kv_heads, block) for x in (q_THC, k_TKC, v_TKC))
  rows = q.shape[2] // channels

  def query_block(i, saved):
    out, lse = saved
    q_i = _take(q, [i], channels)

    def key_blocks(js, carry):
      o, m, total = carry
      s = _dot(q_i, _take(k, js, channels), (2, 2), wide) * channels**-0.5
      s = _mask(s, _seen(layout, block, i, js, rows).T)
      m_new = jnp.maximum(m, s.max(2))
      p = jnp.exp(s - m_new[..., None])
      shrink = jnp.exp(m - m_new)
      new = _dot(p.astype(v.dtype), _take(v, js, channels), (2, 1), wide)
      return o * shrink[..., None] + new, m_new, total * shrink + p.sum(2)

    start = (
      jnp.zeros((kv_heads, rows, channels), wide),
      jnp.full((kv_heads, rows), _HIDDEN, wide),
      jnp.zeros((kv_heads, rows), wide),
    )
    o, m, total = _over_keys(layout, block, i, key_blocks, start)
    return _put(out, i, o / total[..., None]), _put(lse, i, m + jnp.log(total))

  start = jnp.zeros_like(q), jnp.zeros((*q.shape[:2], rows), wide)
  out, lse = lax.fori_loop(0, q.shape[1], query_block, start)
  # Named so that rematerialisation can keep both and skip this loop.
  out_THC = checkpoint_name(_join(out, block, channels), "attention")
  lse = checkpoint_name(lse, "attention")
  return out_THC, (q_THC, k_TKC, v_TKC, layout, out_THC, lse)


def _backward(block, residuals, do_THC):
  q_THC, k_TKC, v_TKC, layout, out_THC, lse = residuals
  wide = lse.dtype
  kv_heads, channels = k_TKC.shape[1:]
  delta_THC = do_THC.astype(wide) * out_THC.astype(wide)
  q, k, v, do, delta = (
    _split(x, kv_heads, block)
    for x in (q_THC, k_TKC, v_TKC, do_THC, delta_THC.sum(-1, keepdims=True))
  )
  rows = lse.shape[2]

  def query_block(i, gradients):
    q_i, do_i = (_take(x, [i], channels) for x in (q, do))
    lse_i, delta_i = (_slice(x, i) for x in (lse, delta))

    def key_blocks(js, carry):
      dq_i, dk, dv = carry
      k_j, v_j = (_take(x, js, channels) for x in (k, v))
      s = _dot(k_j, q_i, (2, 2), wide) * channels**-0.5
      s = _mask(s, _seen(layout, block, i, js, rows))
      p = jnp.exp(s - lse_i)
      dp = _dot(v_j, do_i, (2, 2), wide)
      ds = (p * (dp - delta_i)).astype(q.dtype)
      dv = _add(dv, js, _dot(p.astype(q.dtype), do_i, (2, 1), wide))
      dk = _add(dk, js, _dot(ds, q_i, (2, 1), wide))
      return dq_i + _dot(k_j, ds, (1, 1), wide), dk, dv

    dq, dk, dv = gradients
    start = jnp.zeros(q_i.swapaxes(1, 2).shape, wide), dk, dv
    dq_i, dk, dv = _over_keys(layout, block, i, key_blocks, start)
    return _put(dq, i, dq_i.swapaxes(1, 2)), dk, dv

  start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
  dq, dk, dv = lax.fori_loop(0, q.shape[1], query_block, start)
  scale = channels**-0.5
  return (
    _join(dq * scale, block, channels).astype(q.dtype),
    _join(dk * scale, block, channels).astype(k.dtype),
    _join(dv, block, channels).astype(v.dtype),
    jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), layout),
  )


_attention.defvjp(_forward, _backward)


def _over_keys(
  layout: types.TreeLayout,
  block: int,
  i: jax.Array,
  step: Callable[[Sequence[jax.Array], Any], Any],
  carry: Any,
) -> Any:
  """Runs `step(key blocks, carry)` over the key blocks of query block i.

  Several blocks at a time as long as there are as many, then one at a time.
  """
  first, stop = layout.query_start[i], layout.query_start[i + 1]
  several = max(min(_KEYS // block, _BLOCKS), 1)
  for count in dict.fromkeys((several, 1)):
    steps = (stop - first) // count

    def some(n, carry, first=first, count=count):
      at = first + n * count
      return step([layout.key_block[at + m] for m in range(count)], carry)

    carry = lax.fori_loop(0, steps, some, carry)
    first = first + steps * count
  return carry


def _seen(layout, block, i, js, rows):
  """Which keys of blocks js are visible to block i's rows, [keys, rows]."""
  offset = jnp.arange(block)
  query = jnp.tile(i * block + offset, rows // block)
  key = jnp.concatenate([j * block + offset for j in js])
  end = jnp.concatenate(
    [
      lax.dynamic_slice_in_dim(layout.subtree_end_BT, j * block, block)
      for j in js
    ]
  )
  return (key[:, None] <= query[None, :]) & (query[None, :] < end[:, None])


def _mask(s, seen):
  """Scores [K, ...] without what is not seen.

  The barriers make XLA compute the mask once for all heads, and the masked
  scores once for all their readers, instead of again in each.
  """
  hidden = jnp.where(seen, jnp.zeros((), s.dtype), _HIDDEN)
  return lax.optimization_barrier(s + lax.optimization_barrier(hidden)[None])


def _dot(a, b, contract, wide):
  """Batched matmul over axis 0, contracting one axis of each."""
  dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
  return lax.dot_general(a, b, dims, preferred_element_type=wide)


def _split(x_TXC, kv_heads, block):
  """[T, K * G, C] -> [K, T/block, G * block * C]."""
  T, X, C = x_TXC.shape
  x = x_TXC.reshape(T // block, block, kv_heads, X // kv_heads, C)
  return x.transpose(2, 0, 3, 1, 4).reshape(kv_heads, T // block, -1)


def _join(x, block, channels):
  """[K, T/block, G * block * C] -> [T, K * G, C]."""
  kv_heads, blocks, _ = x.shape
  x = x.reshape(kv_heads, blocks, -1, block, channels)
  return x.transpose(1, 3, 0, 2, 4).reshape(blocks * block, -1, channels)


def _slice(x, i):
  """Block i, [K, 1, size]."""
  size = (x.shape[0], 1, x.shape[2])
  at = (jnp.zeros_like(i), i, jnp.zeros_like(i))
  return lax.dynamic_slice(x, at, size, allow_negative_indices=False)


def _put(x, i, value):
  """x with its block i replaced by a value of as many elements."""
  value = value.reshape(x.shape[0], 1, x.shape[2]).astype(x.dtype)
  at = (jnp.zeros_like(i), i, jnp.zeros_like(i))
  return lax.dynamic_update_slice(x, value, at, allow_negative_indices=False)


def _take(x, blocks, channels):
  """Blocks side by side, [K, rows of all, C]."""
  taken = jnp.concatenate([_slice(x, i) for i in blocks], axis=1)
  return taken.reshape(x.shape[0], -1, channels)


def _add(x, blocks, value):
  """`value`, blocks side by side as `_take` has them, added to x's blocks."""
  value = value.reshape(x.shape[0], len(blocks), x.shape[2])
  for n, i in enumerate(blocks):
    x = _put(x, i, _slice(x, i) + value[:, n : n + 1])
  return x
