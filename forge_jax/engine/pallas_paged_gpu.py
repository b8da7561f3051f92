"""Paged attention on a GPU, in Pallas with the Triton backend.

Flash decoding (Dao et al., 2023) over pages: a program has the queries of one
row that read one KV head, or a tile of them, and walks a share of the row's
pages with an online softmax. Few rows share out their pages among several
programs, so that a single long sequence keeps the whole GPU reading; XLA puts
the shares together. Pages that a row does not have are not read.

The pages are XLA's, heads rounded up to a power of two channels. Products of
float32 are made in TF32, as JAX's matmuls on GPUs are, unless
jax_default_matmul_precision asks for more.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp
import numpy as np

from forge_jax import errors

_HIDDEN = -1e30  # score of a key that is not seen; its weight is 0, because
_LEAST_MAXIMUM = -1e20  # running maxima start here, far above
_LOG2_E = math.log2(math.e)
_LEAST_SIDE = 16  # of a matrix product in Triton
_MOST_QUERIES = 64  # of a tile
# Programs that keep a GPU's multiprocessors (an H100 has 132) busy.
_PROGRAMS = 512


def cache_shape(
  pages: int, page: int, kv_heads: int, channels: int
) -> tuple[int, ...]:
  """[P, K, S, C], channels rounded up.

  Raises:
    ConfigError: pages that the kernel does not do.
  """
  if page < _LEAST_SIDE or page & (page - 1):
    raise errors.ConfigError(
      f"paged attention pallas_gpu does not do pages of {page} tokens; "
      f"expected a power of two from {_LEAST_SIDE} on"
    )
  wide = max(_LEAST_SIDE, pl.next_power_of_2(channels))
  return pages, kv_heads, page, wide


def by_pages(
  q_RWHC: jax.Array, k_PKSC: jax.Array, v_PKSC: jax.Array, rows
) -> jax.Array:
  """Attention of R rows of W tokens, each up to itself; see `attention.Rows`.

  Returns:
    [R, W, H, C], of q's dtype; nothing that counts where a row has no token.
  """
  R, W, H, C = q_RWHC.shape
  _, K, S, wide = k_PKSC.shape
  group, pages = H // K, rows.table_RN.shape[1]
  count = pl.next_power_of_2(W * group)
  tile = min(max(count, _LEAST_SIDE), _MOST_QUERIES)
  tiles = pl.cdiv(W * group, tile)
  # A KV head's queries, token by token, in tiles X of Q.
  q = q_RWHC.reshape(R, W, K, group, C).transpose(0, 2, 1, 3, 4)
  q = q.reshape(R, K, W * group, C)
  missing = tiles * tile - W * group
  q = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, wide - C)))
  q = q.reshape(R, K, tiles, tile, wide).transpose(0, 2, 1, 3, 4)
  q_XKQC = q.reshape(R * tiles, K, tile, wide)
  numbers = jnp.stack([rows.start_R, rows.length_R], axis=1)
  row = jnp.concatenate([numbers, rows.table_RN], axis=1)
  splits = min(pl.cdiv(_PROGRAMS, R * tiles * K), pages)
  grid = (R * tiles, K, splits)
  heads = pl.BlockSpec(
    (k_PKSC.shape[0], None, S, wide), lambda x, k, s: (0, k, 0, 0)
  )
  part = (R * tiles, K, splits, tile)
  number = pl.BlockSpec((None, None, None, tile), lambda x, k, s: (x, k, s, 0))
  o, peak, total = pl.pallas_call(
    functools.partial(
      _kernel, group=group, tiles=tiles, factor=C**-0.5 * _LOG2_E
    ),
    grid=grid,
    in_specs=[
      pl.BlockSpec(
        (None, row.shape[1]), lambda x, k, s: (lax.div(x, np.int32(tiles)), 0)
      ),
      pl.BlockSpec((None, None, tile, wide), lambda x, k, s: (x, k, 0, 0)),
      *(heads, heads),
    ],
    out_specs=[
      pl.BlockSpec(
        (None, None, None, tile, wide), lambda x, k, s: (x, k, s, 0, 0)
      ),
      *(number, number),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((*part, wide), jnp.float32),
      *[jax.ShapeDtypeStruct(part, jnp.float32)] * 2,
    ],
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
    name=f"_paged_{W}_kernel",
  )(row, q_XKQC, k_PKSC, v_PKSC)
  share = jnp.exp2(peak - peak.max(2, keepdims=True))
  total = (share * total).sum(2)
  o = (share[..., None] * o).sum(2) / jnp.where(total == 0, 1, total)[..., None]
  o = o.reshape(R, tiles, K, tile, wide).transpose(0, 2, 1, 3, 4)
  o = o.reshape(R, K, tiles * tile, wide)[:, :, : W * group, :C]
  o = o.reshape(R, K, W, group, C).transpose(0, 2, 1, 3, 4)
  return o.reshape(R, W, H, C).astype(q_RWHC.dtype)


def _kernel(row, q, k, v, o, peak, total, *, group, tiles, factor):
  """A share of a row's pages, for a tile of a KV head's queries.

  Args:
    row: int32: position of the first token, number of tokens, pages.
    q: [Q, C], token by token, `group` heads each.
    k: [P, S, C].
    v: [P, S, C].
    o: [Q, C], not yet divided by the total.
    peak: [Q], the largest score, base 2.
    total: [Q], the sum of the weights.
    group: query heads of a KV head.
    tiles: of a row.
    factor: of the scores.
  """
  (size, channels), page = q.shape, k.shape[1]
  start, length = row[0], row[1]
  first = lax.rem(pl.program_id(0), np.int32(tiles)) * size
  token = lambda index: lax.div(index, np.int32(group))
  # Keys up to the last token of the tile; none where it is all padding.
  last = jnp.minimum(length, token(first + size - 1) + 1)
  keys = jnp.where(token(first) < length, start + last, 0)
  pages = lax.div(keys + page - 1, np.int32(page))
  splits = pl.num_programs(2)
  share = lax.div(pages + splits - 1, splits)
  begin = pl.program_id(2) * share
  end = jnp.minimum(begin + share, pages)
  q_tile = q[...]
  query = start + token(
    first + lax.broadcasted_iota(jnp.int32, (size, page), 0)
  )

  def one(n, carry):
    out, m, weight = carry
    number = row[2 + n]
    s = plt.dot(q_tile, k[number], trans_b=True) * factor
    key = n * page + lax.broadcasted_iota(jnp.int32, s.shape, 1)
    s = jnp.where(key <= query, s, _HIDDEN)
    m_new = jnp.maximum(m, s.max(-1))
    p = jnp.exp2(s - m_new[:, None])
    shrink = jnp.exp2(m - m_new)
    out = out * shrink[:, None] + plt.dot(p.astype(v.dtype), v[number])
    return out, m_new, weight * shrink + p.sum(-1)

  carry = (
    jnp.zeros((size, channels), jnp.float32),
    jnp.full((size,), _LEAST_MAXIMUM, jnp.float32),
    jnp.zeros((size,), jnp.float32),
  )
  o[...], peak[...], total[...] = lax.fori_loop(begin, end, one, carry)
