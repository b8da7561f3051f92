"""CISPO: importance-weighted policy gradient with a clipped, detached weight.

MiniMax-M1 (arXiv 2506.13585, section 3.1, equations 4 and 5): no token's
gradient is dropped, only its weight is bounded.
"""

import jax
from jax import lax
import jax.numpy as jnp


def cispo_loss(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantage: jax.Array,
  weight: jax.Array,
  *,
  ratio_min: float = 0.0,
  ratio_max: float = 5.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Loss of any number of rows, one per response token, in any shape.

  loss = -sum(weight * sg(clip(r, ratio_min, ratio_max)) * advantage * logprob)
  with r = exp(logprob - old_logprob). The weights carry the normaliser, one
  over all response tokens, so the losses of parts add up.

  Args:
    logprob: under the policy being trained, nats.
    old_logprob: as recorded when the token was sampled; same shape, as are
      the next two.
    advantage: of each token.
    weight: factor of each token's term; 0 marks padding.
    ratio_min: lower bound of the ratio; 0 bounds nothing.
    ratio_max: upper bound, 1 + eps_high in the paper.

  Returns:
    The loss and metrics over the rows of non-zero weight, all scalars without
    gradient. They add up over parts, but for `*_max`, which are maxima:
      count: rows
      ratio, ratio_squared: sums of r and r^2; the effective sample size is
        ratio^2 / ratio_squared
      ratio_max: largest r
      clipped: rows whose r was out of bounds
      log_ratio_abs, log_ratio_abs_max: of |log r|
      kl: sum of r - 1 - log r, which estimates KL(old || new)
  """
  log_ratio = lax.stop_gradient(logprob) - old_logprob
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, ratio_min, ratio_max)
  real = weight != 0
  terms = jnp.where(real, weight * clipped * advantage * logprob, 0.0)

  metrics = ratio_metrics(log_ratio, ratio != clipped, real)
  return -terms.sum(), metrics


def ratio_metrics(
  log_ratio: jax.Array, clipped: jax.Array, real: jax.Array
) -> dict[str, jax.Array]:
  """The metrics of `cispo_loss`; bool `clipped` says which rows count so."""
  ratio = jnp.exp(log_ratio)

  def total(values):
    return jnp.where(real, values, 0.0).sum()

  def largest(values):  # of values that are never negative
    return jnp.where(real, values, 0.0).max(initial=0.0)

  return {
    "count": real.sum().astype(ratio.dtype),
    "ratio": total(ratio),
    "ratio_squared": total(ratio**2),
    "ratio_max": largest(ratio),
    "clipped": total(clipped.astype(ratio.dtype)),
    "log_ratio_abs": total(jnp.abs(log_ratio)),
    "log_ratio_abs_max": largest(jnp.abs(log_ratio)),
    "kl": total(ratio - 1 - log_ratio),
  }
