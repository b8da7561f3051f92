"""GRPO's clipped surrogate against a NumPy oracle, and beside CISPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.algo import cispo, grpo
from forge_jax.trainer import update


def _rows(seed=0, size=200):
  rng = np.random.default_rng(seed)
  old = rng.normal(-2, 1, size)
  logprob = old + rng.normal(0, 0.4, size)
  advantage = rng.normal(size=size)
  weight = rng.choice([0.0, 0.01, 0.03], size)
  return logprob, old, advantage, weight


def test_loss_and_gradient_equal_the_oracle():
  logprob, old, advantage, weight = _rows()
  ratio = np.exp(logprob - old)
  free = np.where(advantage > 0, ratio < 1.3, ratio > 0.7)
  assert 20 < free.sum() < 180
  with jax.enable_x64(True):
    (loss, metrics), grad = jax.value_and_grad(grpo.grpo_loss, has_aux=True)(
      jnp.asarray(logprob), old, advantage, weight, ratio_min=0.7, ratio_max=1.3
    )
  bounded = np.where(free, ratio, np.where(advantage > 0, 1.3, 0.7))
  want = -(weight * bounded * advantage).sum()
  np.testing.assert_allclose(loss, want, rtol=1e-12)
  # d loss / d logprob = -w r A, of rows within the bound that they move to.
  want = -weight * ratio * advantage * free
  np.testing.assert_allclose(grad, want, rtol=1e-12, atol=0)
  assert metrics["clipped"] == (~free & (weight != 0)).sum()


def test_on_policy_it_is_cispo():
  logprob, _, advantage, weight = _rows(1)

  def gradient(loss):
    return jax.grad(lambda x: loss(x, logprob, advantage, weight)[0])(
      jnp.asarray(logprob)
    )

  np.testing.assert_allclose(
    gradient(grpo.grpo_loss), gradient(cispo.cispo_loss), rtol=1e-6
  )


def test_padding_adds_nothing_however_wild():
  loss, grad = jax.value_and_grad(
    lambda x: grpo.grpo_loss(
      x, jnp.full(2, -2.0), jnp.ones(2), jnp.array([0.5, 0.0])
    )[0]
  )(jnp.array([-2.0, 300.0]))
  np.testing.assert_allclose(loss, -0.5)
  np.testing.assert_allclose(grad, [-0.5, 0.0])


def test_an_unknown_loss_is_refused():
  with pytest.raises(errors.ConfigError, match="grpo_clip"):
    update.UpdateConfig(loss="grpo")
