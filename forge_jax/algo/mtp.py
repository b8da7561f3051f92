"""Keeping draft modules close to the policy that they draft for.

Reinforcement learning moves the policy away from frozen drafts, and their
tokens are accepted less and less. So the modules are trained along, towards the
current policy, on the tokens that the policy is trained on.
"""

import jax
from jax import lax
import jax.numpy as jnp


def draft_loss(
  policy: jax.Array, draft: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array]:
  """Forward KL(policy || draft) on the policy's likeliest tokens.

  sum over x in the policy's top-k of p(x) (log p(x) - log q(x)), where p is the
  policy renormalised to these tokens and q the draft's distribution over the
  whole vocabulary: probability that the draft spends elsewhere is a loss, too.

  Args:
    policy: logits [..., V]; detached.
    draft: logits [..., V].
    top_k: tokens that count, at most V.

  Returns:
    The loss in nats, and the probability that a drafted token is accepted,
    sum_x min(p(x), q(x)) with both whole (Leviathan et al., 2023, arXiv
    2211.17192, theorem 3.5), without gradient; both [...].
  """
  policy = lax.stop_gradient(policy)
  top, index = lax.top_k(policy, min(top_k, policy.shape[-1]))
  log_p = jax.nn.log_softmax(top, axis=-1)
  log_q_all = jax.nn.log_softmax(draft, axis=-1)
  log_q = jnp.take_along_axis(log_q_all, index, axis=-1)
  loss = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  both = jnp.minimum(jax.nn.log_softmax(policy, axis=-1), log_q_all)
  return loss, jnp.exp(lax.stop_gradient(both)).sum(-1)
