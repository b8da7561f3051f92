"""Paged attention against dense attention over each sequence."""

import functools

import jax
from jax._src import literals
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.engine import attention
from forge_jax.model import decoder as decoder_lib

PAGE, PAGES, HEADS, KV_HEADS, CHANNELS, WIDTH = 8, 30, 6, 2, 16, 5


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


@pytest.fixture(params=attention.KINDS)
def kind(request, monkeypatch):
  """Each kind; what is for another platform is interpreted."""
  if request.param != "xla":
    interpreted = functools.partial(kernel.pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernel.pl, "pallas_call", interpreted)
    # Asked for by the interpreter of constant indices, which have none.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
  return request.param


def test_it_is_dense_attention_over_each_sequence(kind):
  lengths = (1, 8, 19, 30, 13)
  cache, kept, tables = sequences(kind, lengths)
  decode = rows(tables[:3], [0, 7, 18], [1, 1, 1], 1)
  # Two blocks of one sequence, and a part-filled one.
  blocks = rows(
    [tables[3], tables[3], tables[4]], [20, 25, 10], [5, 5, 3], WIDTH
  )
  q = jax.random.normal(jax.random.key(9), (3 + 15 + 2, HEADS, CHANNELS))
  o = jax.jit(attention.attend, static_argnums=(0, 3))(
    kind, q, cache, KV_HEADS, decode, blocks
  )
  checks = [
    *((i, i, start) for i, start in enumerate([0, 7, 18])),
    *((3 + n, 3, 20 + n) for n in range(10)),
    *((13 + n, 4, 10 + n) for n in range(3)),
  ]
  for row, sequence, position in checks:
    k, v = (x[: position + 1] for x in kept[sequence])
    whole = jnp.zeros((position + 1, HEADS, CHANNELS)).at[-1].set(q[row])
    np.testing.assert_allclose(o[row], dense(whole, k, v)[-1], atol=2e-6)
  assert not o[18:].any()


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
  assert attention.choose("cpu") == attention.choose("gpu") == "xla"
  assert attention.choose("tpu", "xla") == "xla"
  with pytest.raises(errors.ConfigError, match="'cuda' is unknown"):
    attention.choose("gpu", "cuda")
