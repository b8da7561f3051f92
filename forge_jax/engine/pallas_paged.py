"""Paged attention on a TPU: JAX's ragged paged attention kernel.

The kernel keeps keys and values of a page in one array, heads interleaved, and
wants channels in multiples of 128 and heads in tiles: what is missing is padded
with zeros, which change no score and no output.
"""

import jax
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
import jax.numpy as jnp

_LANES = 128
_HEADS = (1, 2, 4, 8)  # KV heads, or multiples of the last
# What the kernel works on at once; its own table asks for a device.
_BLOCK_TOKENS = 256
_BLOCK_QUERIES = 32


def cache_shape(
  pages: int, page: int, kv_heads: int, channels: int
) -> tuple[int, ...]:
  """[P, S, 2 K, C], heads and channels rounded up."""
  heads = next((n for n in _HEADS if n >= kv_heads), None)
  heads = heads or -(-kv_heads // _HEADS[-1]) * _HEADS[-1]
  return pages, page, 2 * heads, -(-channels // _LANES) * _LANES


def write(
  cache: jax.Array,
  k_TKC: jax.Array,
  v_TKC: jax.Array,
  page_T: jax.Array,
  offset_T: jax.Array,
) -> jax.Array:
  """Puts new keys and values at (page, offset); past the pages is dropped."""
  both = jnp.stack([k_TKC, v_TKC], axis=2)  # K then V of each head
  both = both.reshape(len(k_TKC), -1, k_TKC.shape[-1])
  both = _widen(both, *cache.shape[-2:]).astype(cache.dtype)
  return cache.at[page_T, offset_T].set(both, mode="drop")


def attend(
  q_THC: jax.Array, cache: jax.Array, kv_heads: int, decode, blocks
) -> jax.Array:
  """See `attention.attend`."""
  (size_D, few), (size_B, width) = decode.token_RW.shape, blocks.token_RW.shape
  ends = [
    few * jnp.arange(size_D + 1),
    few * size_D + width * jnp.arange(1, size_B + 1),
  ]
  count = few * size_D + size_B * width
  # A row counts as whole: what its padding sees is of no account, and each
  # token of it is then at its own position.
  filled = [decode.start_R + few, blocks.start_R + width]
  table = jnp.concatenate([decode.table_RN, blocks.table_RN])
  page, heads, channels = cache.shape[1], *q_THC.shape[1:]
  group = heads // kv_heads
  o = ragged.ragged_paged_attention(
    _widen(q_THC[:count], cache.shape[2] // 2 * group, cache.shape[3]),
    cache,
    jnp.concatenate(filled).astype(jnp.int32),
    table,
    jnp.concatenate(ends).astype(jnp.int32),
    jnp.array([size_D + size_B], jnp.int32),
    sm_scale=channels**-0.5,
    num_kv_pages_per_block=min(max(_BLOCK_TOKENS // page, 1), table.shape[1]),
    num_queries_per_block=min(_BLOCK_QUERIES, count),
  )
  o = o[:, :heads, :channels].astype(q_THC.dtype)
  return jnp.concatenate([o, jnp.zeros_like(q_THC[count:])])


def _widen(x: jax.Array, heads: int, channels: int) -> jax.Array:
  missing = (0, heads - x.shape[1], channels - x.shape[2])
  return jnp.pad(x, [(0, n) for n in missing])
