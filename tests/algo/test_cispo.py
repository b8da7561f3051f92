"""CISPO against a NumPy oracle and a gradient derived by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax.algo import cispo


def _rows(seed=0, size=200):
  rng = np.random.default_rng(seed)
  old = rng.normal(-2, 1, size)
  logprob = old + rng.normal(0, 1.2, size)  # ratios on both sides of 0.5 and 5
  advantage = rng.normal(size=size)
  weight = rng.choice([0.0, 0.01, 0.03], size)
  return logprob, old, advantage, weight


@pytest.mark.parametrize("bounds", [(0.0, 5.0), (0.5, 2.0), (1.0, 1.0)])
def test_loss_and_gradient_equal_the_oracle(bounds):
  logprob, old, advantage, weight = _rows()
  ratio = np.exp(logprob - old)
  clipped = np.minimum(np.maximum(ratio, bounds[0]), bounds[1])
  assert (clipped != ratio).any()
  with jax.enable_x64(True):
    (loss, _), grad = jax.value_and_grad(cispo.cispo_loss, has_aux=True)(
      jnp.asarray(logprob),
      old,
      advantage,
      weight,
      ratio_min=bounds[0],
      ratio_max=bounds[1],
    )
    want = -(weight * clipped * advantage * logprob).sum()
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    # d loss / d logprob = -w sg(clip(r)) A: the clipped rows count too.
    np.testing.assert_allclose(
      grad, -weight * clipped * advantage, rtol=1e-12, atol=0
    )


def test_metrics_equal_the_oracle():
  logprob, old, _, weight = _rows(1)
  _, metrics = cispo.cispo_loss(*map(jnp.asarray, _rows(1)))
  real = weight != 0
  d = (logprob - old)[real]
  ratio = np.exp(d)
  want = {
    "count": real.sum(),
    "ratio": ratio.sum(),
    "ratio_squared": (ratio**2).sum(),
    "ratio_max": ratio.max(),
    "clipped": (ratio > 5).sum(),
    "log_ratio_abs": np.abs(d).sum(),
    "log_ratio_abs_max": np.abs(d).max(),
    "kl": (ratio - 1 - d).sum(),
  }
  assert metrics.keys() == want.keys() and want["clipped"] > 0
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_on_policy_the_gradient_is_the_plain_policy_gradient():
  logprob, _, advantage, weight = _rows(2)
  grad = jax.grad(lambda x: cispo.cispo_loss(x, logprob, advantage, weight)[0])
  np.testing.assert_allclose(
    grad(jnp.asarray(logprob)), -weight * advantage, rtol=1e-6
  )


def test_parts_add_up_and_padding_adds_nothing():
  rows = _rows(3)
  whole, metrics = cispo.cispo_loss(*map(jnp.asarray, rows))
  parts = [
    cispo.cispo_loss(*(jnp.asarray(x[half]) for x in rows))
    for half in (slice(0, 77), slice(77, None))
  ]
  np.testing.assert_allclose(parts[0][0] + parts[1][0], whole, rtol=1e-5)
  for name, value in metrics.items():
    join = max if name.endswith("_max") else lambda a, b: a + b
    got = join(parts[0][1][name], parts[1][1][name])
    np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=name)
  # A padding row, however wild, is ignored, in the gradient as well.
  loss, grad = jax.value_and_grad(
    lambda x: cispo.cispo_loss(
      x, jnp.full(2, -2.0), jnp.ones(2), jnp.array([0.5, 0.0])
    )[0]
  )(jnp.array([-2.0, 300.0]))
  np.testing.assert_allclose(loss, 1.0)
  np.testing.assert_allclose(grad, [-0.5, 0.0])


def test_metrics_carry_no_gradient():
  logprob, old, advantage, weight = map(jnp.asarray, _rows(4))

  def total(x):
    return sum(cispo.cispo_loss(x, old, advantage, weight)[1].values())

  np.testing.assert_array_equal(jax.grad(total)(logprob), 0.0)
