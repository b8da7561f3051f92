"""The two kernels of `pallas_tpu`, each one step: a pair of blocks.

A step sees G query heads and their key head: queries [G, block, C], keys and
values [block, C], the pair's row of subtree ends [1, block]. `rows_ref`,
`pairs_ref` and `lowest_ref` are the plan in scalar memory. Sums are float32 and
live in vector memory from a row's first pair to its last.
"""

import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

LANES = 128  # of a vector register; a row of figures has one copy in each

_HIDDEN = -1e30  # finite, so that a row hidden so far stays free of NaN
_NT = (((1,), (1,)), ((), ()))  # a b^T
_NN = (((1,), (0,)), ((), ()))  # a b


def pair(row, other):
  """A block pair in one int32; both numbers are below 2^15."""
  return row * 2**16 + other


def row_of(pair):
  """The block by which the list of pairs is sorted."""
  return pair >> 16


def other_of(pair):
  """The other block."""
  return pair & 0xFFFF


def forward(
  rows_ref,
  pairs_ref,
  lowest_ref,
  end_ref,
  q_ref,
  k_ref,
  v_ref,
  o_ref,
  lse_ref,
  out_ref,
  max_ref,
  sum_ref,
):
  """A step of a query block: o [G, block, C], log-sum-exp [G, block].

  Scores are [queries, keys]. `out_ref` is like o; the running maximum of the
  raw scores and the running sum are [G, block, 128], equal in all lanes.
  """
  heads, block, C = q_ref.shape
  n = pl.program_id(1)
  query, key = row_of(pairs_ref[n]), other_of(pairs_ref[n])
  factor = _log2_factor(C)

  @pl.when(n == rows_ref[query])
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)
    max_ref[...] = jnp.full_like(max_ref, _HIDDEN)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def compute(masked):
    if masked:
      mask = _visible(query, key, block, end_ref[...], query_axis=0)

    @_each(heads)
    def _(g):
      s = _dot(q_ref[g], k_ref[...], _NT)
      if masked:
        s = jnp.where(mask, s, _HIDDEN)
      m = jnp.maximum(max_ref[g], s.max(1, keepdims=True))
      p = jnp.exp2((s - jnp.tile(m, (1, block // LANES))) * factor)
      shrink = jnp.exp2((max_ref[g] - m) * factor)
      max_ref[g] = m
      sum_ref[g] = sum_ref[g] * shrink + p.sum(1, keepdims=True)
      o = _dot(p.astype(v_ref.dtype), v_ref[...], _NN)
      out_ref[g] = out_ref[g] * shrink[:, :C] + o

  _masked_if_needed(compute, query, key, block, lowest_ref)

  @pl.when(n == rows_ref[query + 1] - 1)
  def _():
    @_each(heads)
    def _(g):
      lse = max_ref[g] * factor + jnp.log2(sum_ref[g])
      lse_ref[pl.ds(g, 1)] = lse.T[:1]
      o_ref[g] = (out_ref[g] / sum_ref[g, :, :C]).astype(o_ref.dtype)


def backward(
  rows_ref,
  pairs_ref,
  lowest_ref,
  end_ref,
  q_ref,
  k_ref,
  v_ref,
  do_ref,
  lse_ref,
  delta_ref,
  zeros_ref,
  dk_ref,
  dv_ref,
  dq_ref,
  dk_sum_ref,
  dv_sum_ref,
  dq_step_ref,
  *dq_buffers,
):
  """A step of a key block: dk and dv [block, C], and its share of dq.

  Scores are [keys, queries]. `lse_ref` and `delta_ref` are [G, block]; for
  dq_ref, which is zeros_ref's memory, see `_adder`.
  """
  del zeros_ref
  heads, block, C = q_ref.shape
  n = pl.program_id(1)
  key, query = row_of(pairs_ref[n]), other_of(pairs_ref[n])
  factor = _log2_factor(C)
  add_to_dq = _adder(pairs_ref, dq_ref, *dq_buffers)

  @pl.when(n == rows_ref[key])
  def _():
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

  def compute(masked):
    if masked:
      end = jnp.broadcast_to(end_ref[...], (LANES, block)).T
      end = jnp.tile(end, (1, block // LANES))
      mask = _visible(query, key, block, end, query_axis=1)
    k_transposed = k_ref[...].T

    @_each(heads)
    def _(g):
      row = pl.ds(g, 1)
      s = _dot(k_ref[...], q_ref[g], _NT)
      if masked:
        s = jnp.where(mask, s, _HIDDEN)
      p = jnp.exp2(s * factor - lse_ref[row])
      dv_sum_ref[...] += _dot(p.astype(do_ref.dtype), do_ref[g], _NN)
      dp = _dot(v_ref[...], do_ref[g], _NT)
      ds = (p * (dp - delta_ref[row])).astype(q_ref.dtype)
      dk_sum_ref[...] += _dot(ds, q_ref[g], _NN)
      dq_step_ref[g] = _dot(k_transposed, ds, _NN)

    add_to_dq(dq_step_ref)

  _masked_if_needed(compute, query, key, block, lowest_ref)

  @pl.when(n == rows_ref[key + 1] - 1)
  def _():
    dk_ref[...] = (dk_sum_ref[...] * C**-0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _adder(pairs_ref, dq_ref, parts_ref, fetched, written):
  """Starts to fetch a query block's part of dq; returns what adds to it.

  dq_ref is all of dq, transposed, [K, G, C, B * T] in device memory. A step
  fetches a part into one of the two buffers of `parts_ref`, adds to it and
  writes it back; `fetched` and `written` count the copies that arrived.

  At most one write is under way, the one of the step before. It is awaited
  before the same part is fetched again, and otherwise after the step's matrix
  products, when it has long arrived. So nothing is read before it is written,
  and a buffer is free when its turn comes again. A key head's last step leaves
  no write under way.
  """
  h, n = pl.program_id(0), pl.program_id(1)
  last = n == pl.num_programs(1) - 1
  block = parts_ref.shape[-1]
  query = other_of(pairs_ref[n])
  query_before = other_of(pairs_ref[jnp.maximum(n - 1, 0)])
  again = query == query_before

  def part(query):
    start = pl.multiple_of(query * block, block)
    return dq_ref.at[h, :, :, pl.ds(start, block)]

  ours, theirs = parts_ref.at[n % 2], parts_ref.at[1 - n % 2]
  fetch = pltpu.make_async_copy(part(query), ours, fetched)
  write = pltpu.make_async_copy(ours, part(query), written)
  write_before = pltpu.make_async_copy(theirs, part(query_before), written)
  pl.when((n > 0) & again)(write_before.wait)
  fetch.start()

  def add(dq_step_ref):
    pl.when((n > 0) & jnp.logical_not(again))(write_before.wait)
    fetch.wait()
    ours[...] += dq_step_ref[...]
    write.start()
    pl.when(last)(write.wait)

  return add


def _masked_if_needed(compute, query, key, block, lowest_ref) -> None:
  """Runs `compute(masked)`, without the mask where the whole pair is visible.

  It is when its queries come after the key block and before the lowest of its
  subtree ends. The mask makes a step up to 5 % longer.
  """
  whole = (query > key) & (lowest_ref[key] >= (query + 1) * block)
  pl.when(whole)(lambda: compute(False))
  pl.when(jnp.logical_not(whole))(lambda: compute(True))


def _each(count: int):
  """Decorates the body of a loop over heads, which is compiled once.

  Unrolled, the schedule is 1 to 2 % shorter, and compiling eight heads takes
  three times as long.
  """
  return lambda body: lax.fori_loop(0, count, lambda g, _: body(g), None)


def _dot(a, b, dims) -> jax.Array:
  """Matrix product accumulated in float32."""
  exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(
    a, b, dims, precision=exact, preferred_element_type=jnp.float32
  )


def _visible(query, key, block, end, *, query_axis) -> jax.Array:
  """Bool [block, block]: whether a query sees a key, given the keys' ends."""
  index = lambda start, axis: (
    start * block + lax.broadcasted_iota(jnp.int32, (block, block), axis)
  )
  queries, keys = index(query, query_axis), index(key, 1 - query_axis)
  return (keys <= queries) & (queries < end)


def _log2_factor(C: int) -> float:
  """What makes raw scores scaled ones in base 2."""
  return C**-0.5 * math.log2(math.e)
