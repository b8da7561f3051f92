"""Attention of a step's new tokens over paged keys and values.

One function, `attend`, behind which are XLA (any platform); on a TPU, the ragged
paged attention kernel of `jax.experimental.pallas` (`pallas_paged.py`); on a
GPU, a kernel of our own (`pallas_paged_gpu.py`). A step's T tokens are D decoding rows, of one token each and
those drafted to follow it, then B blocks of W tokens of a sequence each, then
padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from forge_jax import errors
from forge_jax.engine import pallas_paged, pallas_paged_gpu

KINDS = ("xla", "pallas_tpu", "pallas_gpu")
_FASTEST = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}  # by platform; else xla
Cache = tuple[jax.Array, ...]  # of one layer
_AT_ONCE = 4  # rows times pages that are attended over at a time, at least


class Rows(NamedTuple):
  """Sequences of one width, and where their tokens go."""

  token_RW: jax.Array  # int32
  start_R: jax.Array  # int32, position of the first
  length_R: jax.Array  # int32, how many of the W are tokens
  table_RN: jax.Array  # int32, pages of the sequence; 0 past its end

  @property
  def position_RW(self) -> jax.Array:
    """Positions of the tokens, int32."""
    return self.start_R[:, None] + jnp.arange(self.token_RW.shape[1])[None]

  @property
  def apart(self) -> "Rows":
    """The tokens as rows of one token each, [R * W, 1]."""
    width = self.token_RW.shape[1]
    real_RW = jnp.arange(width)[None] < self.length_R[:, None]
    return Rows(
      self.token_RW.reshape(-1, 1),
      self.position_RW.reshape(-1),
      real_RW.reshape(-1).astype(jnp.int32),
      jnp.repeat(self.table_RN, width, axis=0),
    )

  def places(
    self, page: int, nowhere: int, back: int = 0
  ) -> tuple[jax.Array, jax.Array]:
    """Page and offset of each token [R * W]; `nowhere` where it is padding.

    With `back`, those of the token so many before it, the first's at least.
    """
    at_RW = jnp.maximum(self.position_RW - back, 0)
    index_RW = jnp.minimum(at_RW // page, self.table_RN.shape[1] - 1)
    page_RW = jnp.take_along_axis(self.table_RN, index_RW, axis=1)
    real_RW = jnp.arange(at_RW.shape[1])[None] < self.length_R[:, None]
    page_RW = jnp.where(real_RW, page_RW, nowhere)
    return page_RW.reshape(-1), (at_RW % page).reshape(-1)


def choose(platform: str, kind: str = "auto") -> str:
  """The kind of attention for a platform.

  Raises:
    ConfigError: an unknown kind.
  """
  if kind == "auto":
    return _FASTEST.get(platform, "xla")
  if kind not in KINDS:
    raise errors.ConfigError(
      f"attention={kind!r} is unknown; expected auto or one of {KINDS}"
    )
  return kind


def cache_shapes(
  kind: str, pages: int, page: int, kv_heads: int, channels: int, ways: int = 1
) -> tuple[tuple[int, ...], ...]:
  """Shapes of the arrays of one layer's cache; pages come first.

  With several `ways`, so many devices share the heads.

  Raises:
    ConfigError: pages of a size that this kind does not do.
  """
  if kind == "pallas_tpu":
    *shape, heads, channels = pallas_paged.cache_shape(
      pages, page, kv_heads // ways, channels
    )
    return ((*shape, heads * ways, channels),)
  if kind == "pallas_gpu":
    return (pallas_paged_gpu.cache_shape(pages, page, kv_heads, channels),) * 2
  return ((pages, kv_heads, page, channels),) * 2


def cache_spec(kind: str) -> P:
  """How the arrays of a cache are split over a mesh: by heads."""
  return P(None, None, "tensor") if kind == "pallas_tpu" else P(None, "tensor")


def write(
  kind: str,
  cache: Cache,
  k_TKC: jax.Array,
  v_TKC: jax.Array,
  page_T: jax.Array,
  offset_T: jax.Array,
) -> Cache:
  """Puts new keys and values at (page, offset); past the pages is dropped."""
  if kind == "pallas_tpu":
    return (pallas_paged.write(cache[0], k_TKC, v_TKC, page_T, offset_T),)
  missing = cache[0].shape[-1] - k_TKC.shape[-1]
  new = [
    jnp.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x
    for x in (k_TKC, v_TKC)
  ]
  return tuple(
    buffer.at[page_T, :, offset_T].set(x.astype(buffer.dtype), mode="drop")
    for buffer, x in zip(cache, new, strict=True)
  )


def attend(
  kind: str,
  q_THC: jax.Array,
  cache: Cache,
  kv_heads: int,
  decode: Rows,
  blocks: Rows,
) -> jax.Array:
  """Each token's attention over its sequence up to itself.

  Args:
    kind: one of `KINDS`.
    q_THC: queries: of `decode`, of `blocks`, of padding.
    cache: where the keys and values of these tokens are already.
    kv_heads: K.
    decode: D rows of one token or a few.
    blocks: B rows of W tokens.

  Returns:
    [T, H, C]; zeros for padding.
  """
  if kind == "pallas_tpu":
    return pallas_paged.attend(q_THC, cache[0], kv_heads, decode, blocks)
  if kind == "pallas_gpu":
    by_pages, parts = pallas_paged_gpu.by_pages, (decode, blocks)
  else:
    # A few tokens go as rows of their own: to the last bit what each is alone.
    by_pages, parts = _by_pages, (decode.apart, blocks)
  outs, start = [], 0
  for rows in parts:
    count = rows.token_RW.size
    if count:
      q = q_THC[start : start + count]
      q = q.reshape(*rows.token_RW.shape, *q.shape[1:])
      outs.append(by_pages(q, *cache, rows).reshape(count, *q_THC.shape[1:]))
      start += count
  outs.append(jnp.zeros_like(q_THC[start:]))
  return jnp.concatenate(outs)


class Paged:
  """A layer's attention of a step's tokens, which joins them to its pages.

  Stands for the decoder's `attend`, once; `cache` then holds the tokens, too.
  Every device has its own heads, to which the others' are nothing.
  """

  def __init__(
    self,
    kind: str,
    cache: Cache,
    at: tuple[jax.Array, jax.Array],
    decode: Rows,
    blocks: Rows,
    mesh: Mesh,
  ):
    """Takes the pages so far, and where the tokens of `attend` go."""
    self.cache = cache
    self._kind, self._mesh = kind, mesh
    self._rows = at, decode, blocks

  def __call__(
    self, q_THC: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array
  ) -> jax.Array:
    """See `attend`."""
    join = functools.partial(_join, self._kind)
    if self._mesh.shape["tensor"] > 1:
      heads, pages = P(None, "tensor"), cache_spec(self._kind)
      join = jax.shard_map(
        join,
        mesh=self._mesh,
        in_specs=(heads, heads, heads, pages, P()),
        out_specs=(heads, pages),
        check_vma=False,  # no kernel says how its outputs vary
      )
    o_THC, self.cache = join(q_THC, k_TKC, v_TKC, self.cache, self._rows)
    return o_THC


def _join(kind, q_THC, k_TKC, v_TKC, cache, rows):
  """Writes one device's heads to its pages, then attends over them."""
  at, decode, blocks = rows
  cache = write(kind, cache, k_TKC, v_TKC, *at)
  heads = k_TKC.shape[-2]
  return attend(kind, q_THC, cache, heads, decode, blocks), cache


def _by_pages(
  q_RWHC: jax.Array, k_PKSC: jax.Array, v_PKSC: jax.Array, rows: Rows
) -> jax.Array:
  """Online softmax over the sequences' pages, one of each at a time.

  A page that a sequence does not have adds exactly nothing, so a row's result
  does not depend on how long the others are. A page of every row at once stays
  in the processor's cache, so memory is read once; gathering all pages first
  costs several times as much on a CPU. Of very few rows several pages are taken
  at a time: what an operation costs, however small, would be most of the time.
  """
  R, W, H, C = q_RWHC.shape
  _, K, S, _ = k_PKSC.shape
  step = max(_AT_ONCE // R, 1)  # pages of a row at a time
  wide = jnp.promote_types(q_RWHC.dtype, jnp.float32)
  q = q_RWHC.reshape(R, W, K, H // K, C).transpose(0, 2, 1, 3, 4)
  q = q.reshape(R, K, -1, C) * jnp.asarray(C**-0.5, q_RWHC.dtype)
  q = jnp.repeat(q, step, axis=0)
  # Each query's position, in the order of q's rows.
  at_RG = jnp.repeat(rows.position_RW, H // K, axis=1)
  # What is past the end of a table is never seen.
  missing = -rows.table_RN.shape[1] % step
  table_RN = jnp.pad(rows.table_RN, ((0, 0), (0, missing)))

  def body(n, state):
    peak, total, o = state
    page = jax.lax.dynamic_slice_in_dim(table_RN, n * step, step, 1).reshape(-1)
    k, v = (x.at[page].get(mode="clip") for x in (k_PKSC, v_PKSC))
    scores = jnp.einsum("pkgc,pksc->pkgs", q, k, preferred_element_type=wide)
    scores = scores.reshape(R, step, *scores.shape[1:])
    position = (n * step + jnp.arange(step))[:, None] * S + jnp.arange(S)[None]
    seen = position[None, :, None] <= at_RG[:, None, :, None]
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max((1, 4)))
    mass = jnp.exp(scores - new_peak[:, None, ..., None])
    keep = jnp.exp(peak - new_peak)
    part = jnp.einsum(
      "pkgs,pksc->pkgc",
      mass.reshape(R * step, *mass.shape[2:]).astype(v.dtype),
      v,
      preferred_element_type=wide,
    )
    part = part.reshape(R, step, *part.shape[1:]).sum(1)
    return (
      new_peak,
      total * keep + mass.sum((1, 4)),
      o * keep[..., None] + part,
    )

  shape = (R, K, q.shape[2])
  lowest = jnp.finfo(wide).min
  state = (
    jnp.full(shape, lowest, wide),
    jnp.zeros(shape, wide),
    jnp.zeros((*shape, C), wide),
  )
  last_R = rows.start_R + rows.length_R
  count = (jnp.maximum(last_R.max(), 1) + step * S - 1) // (step * S)
  _, total, o = jax.lax.fori_loop(0, count, body, state)
  # Padding of a block may be past every page that was looped over: no mass.
  o = o / jnp.where(total == 0, 1, total)[..., None]
  o = o.reshape(R, K, W, H // K, C).transpose(0, 2, 1, 3, 4)
  return o.reshape(R, W, H, C).astype(q_RWHC.dtype)
