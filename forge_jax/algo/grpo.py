"""GRPO's clipped surrogate, to compare CISPO with.

DeepSeekMath (arXiv 2402.03300, equation 3) without its KL term, as in PPO: a
token whose ratio has left the bounds in the direction of its advantage has no
gradient any more.
"""

import jax
from jax import lax
import jax.numpy as jnp

from forge_jax.algo import cispo


def grpo_loss(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantage: jax.Array,
  weight: jax.Array,
  *,
  ratio_min: float = 0.8,
  ratio_max: float = 1.2,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Loss of any number of rows, one per response token, in any shape.

  loss = -sum(weight * min(r * advantage, clip(r, ratio_min, ratio_max) *
  advantage)) with r = exp(logprob - old_logprob).

  Args, Returns: as of `cispo.cispo_loss`, but for
    ratio_min, ratio_max: 1 - eps and 1 + eps in the paper.
    clipped: rows without a gradient, for the bound they are beyond.
  """
  real = weight != 0
  # Before the exponential, so that padding has no gradient, however wild.
  log_ratio = jnp.where(real, logprob - old_logprob, 0.0)
  ratio = jnp.exp(log_ratio)
  bounded = jnp.clip(ratio, ratio_min, ratio_max)
  surrogate = jnp.minimum(ratio * advantage, bounded * advantage)
  terms = jnp.where(real, weight * surrogate, 0.0)
  clipped = bounded * advantage < ratio * advantage
  metrics = cispo.ratio_metrics(lax.stop_gradient(log_ratio), clipped, real)
  return -terms.sum(), metrics
