"""On-device sampling against the distributions it should follow."""

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax.engine import sampling


def draw(logits, rows, *, temperature=1.0, top_k=0, top_p=1.0, filtered=False):
  logits_RV = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (rows, 1))
  fill = lambda value, dtype: jnp.full((rows,), value, dtype)
  return sampling.sample(
    logits_RV,
    jnp.arange(rows, dtype=jnp.uint32),
    fill(7, jnp.int32),
    fill(temperature, jnp.float32),
    fill(top_k, jnp.int32),
    fill(top_p, jnp.float32),
    filtered=filtered,
  )


def test_frequencies_follow_the_softmax():
  logits = np.random.default_rng(0).normal(size=600) * 2
  token_R, logprob_R = draw(logits, 40_000)
  expected = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
  found = np.bincount(np.asarray(token_R), minlength=600) / 40_000
  # Chi-square per degree of freedom is 1 on average, with deviation ~0.06.
  chi2 = ((found - expected) ** 2 / expected).sum() * 40_000 / 599
  assert chi2 < 1.3
  np.testing.assert_allclose(
    logprob_R, np.log(expected)[np.asarray(token_R)], atol=1e-5
  )


def test_temperature_zero_is_greedy_with_the_logprob_of_temperature_one():
  logits = [0.0, 3.0, 1.0]
  token_R, logprob_R = draw(logits, 5, temperature=0.0)
  assert set(np.asarray(token_R)) == {1}
  expected = jax.nn.log_softmax(jnp.asarray(logits))[1]
  np.testing.assert_allclose(logprob_R, expected, atol=1e-6)


def test_temperature_scales_the_reported_distribution():
  logits = jnp.asarray([0.0, 1.0, 2.0])
  token_R, logprob_R = draw(logits, 64, temperature=0.5)
  expected = jax.nn.log_softmax(logits / 0.5)[token_R]
  np.testing.assert_allclose(logprob_R, expected, atol=1e-6)


def test_top_k_and_top_p_renormalise_what_they_keep():
  logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1]))
  token_R, logprob_R = draw(logits, 500, top_k=2, filtered=True)
  assert set(np.asarray(token_R)) == {0, 1}
  expected = np.log([2 / 3, 1 / 3])[np.asarray(token_R)]
  np.testing.assert_allclose(logprob_R, expected, atol=1e-5)
  token_R, _ = draw(logits, 500, top_p=0.8, filtered=True)
  assert set(np.asarray(token_R)) == {0, 1, 2}


def test_a_row_does_not_depend_on_its_neighbours():
  logits_RV = jax.random.normal(jax.random.key(0), (8, 300))
  args = (
    jnp.arange(8, dtype=jnp.uint32),
    jnp.arange(8),
    jnp.ones(8),
    jnp.zeros(8, jnp.int32),
    jnp.ones(8),
  )
  token_R, logprob_R = sampling.sample(logits_RV, *args, filtered=False)
  back = [x[::-1] for x in args]
  token_back, logprob_back = sampling.sample(
    logits_RV[::-1], *back, filtered=False
  )
  np.testing.assert_array_equal(token_R, token_back[::-1])
  np.testing.assert_array_equal(logprob_R, logprob_back[::-1])
