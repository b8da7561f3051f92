"""Paged attention against dense attention over each sequence."""

import dataclasses
import functools

import jax
from jax._src import literals
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_engine

from experiments.benchmarks import gpu_paged
from forge_jax import errors
from forge_jax.engine import attention
from forge_jax.model import decoder as decoder_lib

PAGE, PAGES, HEADS, KV_HEADS, CHANNELS, WIDTH = 16, 30, 6, 2, 20, 30


def sequences(kind, lengths, seed=0):
  """Caches that hold sequences of random keys and values, and their pages."""
  keys = jax.random.split(jax.random.key(seed), 2 * len(lengths))
  shapes = attention.cache_shapes(kind, PAGES, PAGE, KV_HEADS, CHANNELS)
  cache = tuple(jnp.zeros(shape) for shape in shapes)
  pages = iter(np.random.default_rng(seed).permutation(PAGES - 1) + 1)
  kept, tables = [], []
  for n, length in enumerate(lengths):
    k, v = (
      jax.random.normal(key, (length, KV_HEADS, CHANNELS))
      for key in keys[2 * n : 2 * n + 2]
    )
    table = [int(next(pages)) for _ in range(-(-length // PAGE))]
    at = np.arange(length)
    page = np.asarray(table)[at // PAGE]
    cache = attention.write(kind, cache, k, v, page, at % PAGE)
    kept.append((k, v))
    tables.append(table)
  return cache, kept, tables


def rows(tables, starts, lengths, width):
  size = len(starts)
  table = np.zeros((size, 6), np.int32)
  for i, some in enumerate(tables):
    table[i, : len(some)] = some
  return attention.Rows(
    jnp.zeros((size, width), jnp.int32),
    jnp.asarray(starts, jnp.int32),
    jnp.asarray(lengths, jnp.int32),
    jnp.asarray(table),
  )


def dense(q_LHC, k, v):
  return decoder_lib.causal_attend(q_LHC[None], k[None], v[None])[0]


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels run as plain JAX."""
  call = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pl, "pallas_call", call)
  # Asked for by the interpreter of constant indices, which have none.
  monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_it_is_dense_attention_over_each_sequence(kind, interpreted):
  cache, kept, tables = sequences(kind, (1, 16, 37, 60, 26))
  decode = rows(tables[:3], [0, 15, 36], [1, 1, 1], 1)
  # Two blocks of one sequence, and a part-filled one.
  blocks = rows(
    [tables[3], tables[3], tables[4]], [0, 30, 23], [30, 30, 3], WIDTH
  )
  q = jax.random.normal(jax.random.key(9), (3 + 90 + 2, HEADS, CHANNELS))
  o = jax.jit(attention.attend, static_argnums=(0, 3))(
    kind, q, cache, KV_HEADS, decode, blocks
  )
  # The first row, how many, of which sequence, from which position.
  for row, count, sequence, start in (
    *((n, 1, n, start) for n, start in enumerate([0, 15, 36])),
    *((3, 60, 3, 0), (63, 3, 4, 23)),
  ):
    here = slice(row, row + count)
    whole = jnp.zeros((start + count, HEADS, CHANNELS))
    want = dense(whole.at[start:].set(q[here]), *kept[sequence])[start:]
    np.testing.assert_allclose(o[here], want, atol=2e-6)
  assert not o[93:].any()


def test_a_token_and_its_drafts_are_one_row_of_the_gpu_kernel(interpreted):
  cache, kept, tables = sequences("pallas_gpu", (35, 12))
  decode = rows([*tables, []], [32, 10, 0], [3, 2, 0], 3)
  q = jax.random.normal(jax.random.key(9), (9, HEADS, CHANNELS))
  o = attention.attend(
    "pallas_gpu", q, cache, KV_HEADS, decode, rows([], [], [], WIDTH)
  )
  for row, count, sequence in ((0, 3, 0), (3, 2, 1)):
    k, v = kept[sequence]
    whole = jnp.zeros((len(k), HEADS, CHANNELS))
    whole = whole.at[-count:].set(q[row : row + count])
    want = dense(whole, k, v)[-count:]
    np.testing.assert_allclose(o[row : row + count], want, atol=2e-6)
  assert not o[6:].any()  # a row without tokens reads no page


def test_the_benchmark_compares_and_measures(interpreted):
  case = gpu_paged.Case(
    rows=2,
    width=1,
    length=40,
    page=16,
    heads=4,
    kv_heads=2,
    channels=16,
    dtype=jnp.float32,
  )
  for some in (case, dataclasses.replace(case, width=5)):
    kernel, xla = gpu_paged.compare(some, 1)
    assert (kernel["kind"], xla["kind"]) == gpu_paged.KINDS
    assert kernel["error"] < 1e-5
    moved = kernel["gb_per_s"] * kernel["ms"] * 1e6
    assert moved == pytest.approx(2 * 40 * 2 * 2 * 16 * 4)
  model = dataclasses.replace(
    tiny_engine.MODEL, vocab_size=128, num_layers=1, max_context=512
  )
  found = gpu_paged.decode(model, (2,), 1.0, new=2, runs=1)
  assert found["2"]["tokens_per_s"] > 0 and found["2"]["roofline"] > 0


def test_pages_that_triton_cannot_multiply_are_refused():
  for page in (8, 48):
    with pytest.raises(errors.ConfigError, match=f"pages of {page} tokens"):
      attention.cache_shapes("pallas_gpu", PAGES, page, KV_HEADS, CHANNELS)


def test_a_row_is_the_same_bits_beside_longer_ones():
  cache, _, tables = sequences("xla", (5, 40))
  q = jax.random.normal(jax.random.key(9), (2, HEADS, CHANNELS))
  none = rows([], [], [], WIDTH)
  run = jax.jit(attention.attend, static_argnums=(0, 3))
  beside = run(
    "xla", q, cache, KV_HEADS, rows(tables, [4, 39], [1, 1], 1), none
  )
  short = run(
    "xla", q, cache, KV_HEADS, rows([tables[0]] * 2, [4, 4], [1, 1], 1), none
  )
  np.testing.assert_array_equal(beside[0], short[0])


def test_padding_is_not_written():
  cache, _, tables = sequences("xla", (8,))
  some = rows([tables[0], []], [6, 0], [1, 0], 2)
  page, offset = some.places(PAGE, PAGES)
  assert page.tolist() == [tables[0][0], PAGES, PAGES, PAGES]
  assert offset.tolist()[0] == 6
  ones = jnp.ones((4, KV_HEADS, CHANNELS))
  after = attention.write("xla", cache, ones, ones, page, offset)
  changed = np.argwhere((np.asarray(after[0] != cache[0])).any((1, 3)))
  assert changed.tolist() == [[tables[0][0], 6]]


def test_the_kind_follows_the_platform():
  assert attention.choose("tpu") == "pallas_tpu"
  assert attention.choose("gpu") == "pallas_gpu"
  assert attention.choose("cpu") == "xla"
  assert attention.choose("tpu", "xla") == "xla"
  with pytest.raises(errors.ConfigError, match="'cuda' is unknown"):
    attention.choose("gpu", "cuda")
