"""On-device sampling against the distributions it should follow."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from forge_jax.engine import api, sampling

_SAMPLE = jax.jit(sampling.sample)
_FILTER = jax.jit(sampling._filter)


def draw(
  logits,
  rows,
  *,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  min_p=0.0,
):
  logits_RV = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (rows, 1))
  fill = lambda value, dtype: jnp.broadcast_to(
    jnp.asarray(value, dtype), (rows,)
  )
  return _SAMPLE(
    logits_RV,
    jnp.arange(rows, dtype=jnp.uint32),
    fill(7, jnp.int32),
    fill(temperature, jnp.float32),
    fill(top_k, jnp.int32),
    fill(top_p, jnp.float32),
    fill(min_p, jnp.float32),
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
  token_R, logprob_R = draw(logits, 500, top_k=2)
  assert set(np.asarray(token_R)) == {0, 1}
  expected = np.log([2 / 3, 1 / 3])[np.asarray(token_R)]
  np.testing.assert_allclose(logprob_R, expected, atol=1e-5)
  token_R, _ = draw(logits, 500, top_p=0.8)
  assert set(np.asarray(token_R)) == {0, 1, 2}


def test_a_row_does_not_depend_on_its_neighbours():
  logits_RV = jax.random.normal(jax.random.key(0), (8, 300))
  args = (
    jnp.arange(8, dtype=jnp.uint32),
    jnp.arange(8),
    jnp.ones(8),
    jnp.zeros(8, jnp.int32),
    jnp.ones(8),
    jnp.zeros(8),
  )
  token_R, logprob_R = sampling.sample(logits_RV, *args)
  back = [x[::-1] for x in args]
  token_back, logprob_back = sampling.sample(logits_RV[::-1], *back)
  np.testing.assert_array_equal(token_R, token_back[::-1])
  np.testing.assert_array_equal(logprob_R, logprob_back[::-1])


_SAMPLE_SHAPED = jax.jit(sampling.sample_shaped)


def shaped(logits_RV, shapes, *, temperature=1.0, min_p=0.0, tops=False):
  rows, vocab = logits_RV.shape
  return _SAMPLE_SHAPED(
    jnp.asarray(logits_RV, jnp.float32),
    sampling.stack(shapes, vocab),
    tops,
    jnp.arange(rows, dtype=jnp.uint32),
    jnp.full(rows, 7),
    jnp.full(rows, temperature),
    jnp.zeros(rows, jnp.int32),
    jnp.ones(rows),
    jnp.full(rows, min_p),
  )


def shape(prompt=(), response=(), allowed=None, **params):
  return sampling.Shape.make(
    api.SamplingParams(max_tokens=1, **params),
    np.asarray(prompt, np.int32),
    response,
    allowed,
  )


def edited(logits, prompt, response, params):
  """The reference: one token and one rule at a time, in float64."""
  logits = np.array(logits, np.float64)
  for t in set(prompt) | set(response):
    factor = params.repetition_penalty
    logits[t] = logits[t] / factor if logits[t] > 0 else logits[t] * factor
  for t in response:
    logits[t] -= params.frequency_penalty
  for t in set(response):
    logits[t] -= params.presence_penalty
  for t, bias in params.logit_bias:
    logits[t] += bias
  return logits


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
  logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1]))
  token_R, logprob_R = draw(logits, 500, min_p=0.3)
  assert set(np.asarray(token_R)) == {0, 1, 2}
  expected = np.log([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9])[np.asarray(token_R)]
  np.testing.assert_allclose(logprob_R, expected, atol=1e-5)


def test_top_p_zero_keeps_the_likeliest():
  token_R, logprob_R = draw([0.0, 2.0, 1.0], 50, top_p=0.0)
  assert set(np.asarray(token_R)) == {1}
  np.testing.assert_allclose(logprob_R, 0.0, atol=1e-6)


def test_a_filter_of_another_row_cuts_no_tail():
  logits = np.full(600, -20.0)
  logits[0] = 0.0  # the tail's cumulative probability rounds to one
  _, plain = draw(logits, 3)
  _, beside = draw(logits, 3, top_k=[0, 0, 5])
  np.testing.assert_array_equal(plain[:2], beside[:2])


@given(data=st.data())
@settings(max_examples=40)
def test_edits_follow_the_reference(data):
  tokens = st.lists(st.integers(0, 96), max_size=12)
  prompt, response = data.draw(tokens), data.draw(tokens)
  params = api.SamplingParams(
    max_tokens=1,
    presence_penalty=data.draw(st.sampled_from([0.0, 1.5, -2.0])),
    frequency_penalty=data.draw(st.sampled_from([0.0, 0.7, -1.0])),
    repetition_penalty=data.draw(st.sampled_from([1.0, 1.3, 0.8])),
    logit_bias=tuple(
      data.draw(
        st.dictionaries(st.integers(0, 96), st.floats(-9, 9), max_size=4)
      ).items()
    ),
    top_logprobs=20,
  )
  logits = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=97)
  made = sampling.Shape.make(params, np.asarray(prompt, np.int32), response)
  token_R, logprob_R, top_token, top_logprob = shaped(
    np.tile(logits * 3, (2, 1)), [made, None], tops=True
  )
  for row, reference in enumerate(
    (edited(logits * 3, prompt, response, params), logits * 3)
  ):
    expected = reference - np.logaddexp.reduce(reference)
    np.testing.assert_allclose(
      logprob_R[row], expected[token_R[row]], atol=1e-4
    )
    np.testing.assert_allclose(
      top_logprob[row], np.sort(expected)[::-1][:20], atol=1e-4
    )
    np.testing.assert_allclose(
      top_logprob[row], expected[top_token[row]], atol=1e-4
    )


def test_only_allowed_tokens_are_drawn_and_their_mass_is_one():
  vocab, rows = 700, 3000
  rng = np.random.default_rng(0)
  logits = rng.normal(size=vocab) * 2
  some = np.sort(rng.choice(vocab, 9, replace=False))
  bits = np.zeros(704, np.uint8)
  bits[some] = 1
  words = np.packbits(bits, bitorder="little").view(np.uint32)
  token_R, logprob_R, *_ = shaped(
    np.tile(logits, (rows, 1)), [shape(allowed=words)] * rows
  )
  expected = logits[some] - np.logaddexp.reduce(logits[some])
  found = np.asarray(token_R)
  place = np.searchsorted(some, found)
  np.testing.assert_array_equal(some[place], found)
  np.testing.assert_allclose(logprob_R, expected[place], atol=1e-4)
  share = np.bincount(place, minlength=9) / rows
  np.testing.assert_allclose(share, np.exp(expected), atol=0.04)


def test_a_lone_allowed_token_is_certain_at_any_temperature():
  words = np.zeros(4, np.uint32)
  words[2] = 1 << 5
  logits = np.random.default_rng(1).normal(size=(8, 100))
  for temperature in (0.0, 0.3, 2.0):
    token_R, logprob_R, top_token, top_logprob = shaped(
      logits,
      [shape(allowed=words, top_logprobs=3)] * 8,
      temperature=temperature,
      tops=True,
    )
    np.testing.assert_array_equal(token_R, 69)
    np.testing.assert_allclose(logprob_R, 0.0, atol=1e-6)
    result = sampling.Sampled(
      np.asarray(token_R),
      np.asarray(logprob_R),
      np.asarray(top_token),
      np.asarray(top_logprob),
    )
    assert [token for token, _ in result.tops(0, 3)] == [69]


def test_a_request_that_changes_nothing_has_no_shape():
  assert shape(prompt=[1], response=[2], temperature=0.5, min_p=0.1) is None


@given(data=st.data())
@settings(max_examples=30)
def test_limits_keep_what_a_sort_keeps(data):
  some = st.floats(-30, 30, width=32)
  vocab = 40
  logits = np.array(
    data.draw(st.lists(some, min_size=vocab, max_size=vocab)), np.float32
  )
  top_k = data.draw(st.integers(0, 50))
  top_p = data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.99, 1.0]))
  min_p = data.draw(st.sampled_from([0.0, 0.01, 0.3]))
  limits = ([top_k], [top_p], [min_p])
  found = _FILTER(jnp.asarray(logits)[None], *map(jnp.asarray, limits))[0]
  ordered = np.sort(logits.astype(np.float64))[::-1][: top_k or vocab]
  mass = np.exp(ordered - ordered[0])
  before = (np.cumsum(mass) - mass) / mass.sum()
  floor = ordered[max((before < top_p).sum(), 1) - 1 if top_p < 1 else -1]
  with np.errstate(divide="ignore"):
    floor = max(floor, np.float32(ordered[0]) + np.log(np.float32(min_p)))
  clear = np.abs(logits - floor) > 1e-4  # what rounding cannot decide
  assume((np.abs(before - top_p) > 1e-5).all())
  np.testing.assert_array_equal(
    np.isfinite(found)[clear], (logits >= floor)[clear]
  )
  assert np.isfinite(found)[logits.argmax()]
