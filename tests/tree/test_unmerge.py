"""Chunked log-probabilities against whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.tree import unmerge

B, T, D, V, E = 2, 9, 5, 11, 10


def _inputs():
  rng = np.random.default_rng(0)
  hidden_BTD = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  parent_BE = jnp.asarray(rng.integers(0, T, (B, E)), jnp.int32)
  token_BE = rng.integers(0, V, (B, E)).astype(np.int32)
  token_BE[0, 4:] = -1
  token_BE[1, 9:] = -1
  table_VD = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
  return hidden_BTD, parent_BE, jnp.asarray(token_BE), table_VD


def _whole(hidden_BTD, parent_BE, token_BE, table_VD):
  hidden_BED = jnp.stack([hidden_BTD[b][parent_BE[b]] for b in range(B)])
  logits = hidden_BED @ table_VD.T
  logprobs = jax.nn.log_softmax(logits)
  real = token_BE >= 0
  one_hot = jax.nn.one_hot(token_BE, V)  # of -1: zeros
  entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
  return (logprobs * one_hot).sum(-1), jnp.where(real, entropy, 0.0)


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
def test_chunks_change_nothing(chunk):
  hidden, parent, token, table = _inputs()

  def chunked(hidden, table):
    return unmerge.edge_logprobs(
      hidden, parent, token, lambda h: h @ table.T, chunk=chunk
    )

  def loss(function):
    weights = jnp.arange(1.0, 1 + E)[None]
    return lambda *args: (function(*args)[0] * weights).sum()

  def whole(hidden, table):
    return _whole(hidden, parent, token, table)

  pairs = zip(chunked(hidden, table), whole(hidden, table), strict=True)
  for got, want in pairs:
    assert got.shape == (B, E)
    np.testing.assert_allclose(got, want, atol=1e-5)
  got = jax.jit(jax.grad(loss(chunked), (0, 1)))(hidden, table)
  want = jax.grad(loss(whole), (0, 1))(hidden, table)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4)


def test_entropy_carries_no_gradient():
  hidden, parent, token, table = _inputs()

  def entropy(hidden):
    return unmerge.edge_logprobs(
      hidden, parent, token, lambda h: h @ table.T, chunk=4
    )[1].sum()

  assert entropy(hidden) > 0
  np.testing.assert_array_equal(jax.grad(entropy)(hidden), 0.0)


def test_the_head_runs_only_where_there_are_edges():
  hidden, parent, token, table = _inputs()
  token = token.at[1].set(token[0])  # 4 edges a pack, 3 chunks of 4
  calls = []

  def head(h):
    jax.debug.callback(lambda: calls.append(h.shape))
    return h @ table.T

  out = unmerge.edge_logprobs(hidden, parent, token, head, chunk=4)
  jax.block_until_ready(out)
  jax.effects_barrier()
  assert calls == [(B, 4, D)]


def test_no_array_of_whole_logits_exists():
  hidden, parent, token, table = _inputs()

  def loss(hidden, table):
    return unmerge.edge_logprobs(
      hidden, parent, token, lambda h: h @ table.T, chunk=2
    )[0].sum()

  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile()
  text = compiled.as_text()
  assert f"[{B},2,{V}]" in text
  for shape in (f"[{B},{E},{V}]", f"[{E // 2},{B},2,{V}]"):
    assert shape not in text


def test_rows_share_edges():
  logprob_BE = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
  row_edge_BM = jnp.asarray([[0, 0, 1], [1, 0, 1]])
  np.testing.assert_array_equal(
    unmerge.by_row(logprob_BE, row_edge_BM), [[1, 1, 2], [4, 3, 4]]
  )
