"""From the merged tree back to the samples: log-probabilities of their rows.

An edge's logits are read at its parent's hidden state. They are made a chunk
of edges at a time and made again in the backward pass, so the logits of a
batch never exist whole. A chunk without edges costs nothing.
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax
import jax.numpy as jnp


def edge_logprobs(
  hidden_BTD: jax.Array,
  edge_parent_BE: jax.Array,
  edge_token_BE: jax.Array,
  head: Callable[[jax.Array], jax.Array],
  *,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each edge's token, and the entropy of its prediction.

  Args:
    hidden_BTD: final hidden states.
    edge_parent_BE: int32, where in T the edge's token is predicted.
    edge_token_BE: int32 token ids; -1 marks padding.
    head: maps hidden states [B, chunk, D] to logits [B, chunk, V], in at least
      float32.
    chunk: edges of a pack whose logits exist at a time.

  Returns:
    Two arrays [B, E] in the logits' dtype, in nats, 0 at padding. The entropy
    carries no gradient.
  """
  dtype = jax.eval_shape(head, hidden_BTD[:, :1]).dtype

  def logprobs(parent_Be, token_Be):
    return _token_logprobs(head(_at(hidden_BTD, parent_Be)), token_Be)

  return _by_chunk(logprobs, edge_parent_BE, edge_token_BE, 2, dtype, chunk)


def edge_draft_losses(
  hidden_BTD: jax.Array,
  drafts: Sequence[jax.Array],
  edge_parent_BE: jax.Array,
  edge_token_BE: jax.Array,
  head: Callable[[jax.Array], jax.Array],
  loss: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
  *,
  chunk: int,
) -> list[tuple[jax.Array, jax.Array]]:
  """How far draft modules are from the policy at the edges.

  Args:
    hidden_BTD: final hidden states of the policy.
    drafts: of each module, [B, T, D] as well.
    edge_parent_BE: as for `edge_logprobs`, as are the next two and `chunk`.
    edge_token_BE: token ids.
    head: to logits.
    loss: of logits [B, chunk, V] of the policy and of a draft: two figures
      [B, chunk], such as `algo.mtp.draft_loss`.
    chunk: edges of a pack whose logits exist at a time.

  Returns:
    The two figures of each module, [B, E], 0 at padding.
  """
  dtype = jax.eval_shape(head, hidden_BTD[:, :1]).dtype

  def losses(parent_Be, token_Be):
    policy_BeV = head(_at(hidden_BTD, parent_Be))
    found = []
    for draft_BTD in drafts:
      pair = loss(policy_BeV, head(_at(draft_BTD, parent_Be)))
      found += [jnp.where(token_Be >= 0, x_Be, 0.0) for x_Be in pair]
    return tuple(found)

  figures = _by_chunk(
    losses, edge_parent_BE, edge_token_BE, 2 * len(drafts), dtype, chunk
  )
  return list(zip(figures[::2], figures[1::2], strict=True))


def _at(x_BTD, index_Be):
  return jnp.take_along_axis(x_BTD, index_Be[..., None], axis=1)


def _by_chunk(figures_of, edge_parent_BE, edge_token_BE, count, dtype, chunk):
  """`count` arrays [B, E] from a function of (parents, tokens) [B, chunk]."""
  B, E = edge_token_BE.shape
  chunks = -(-E // chunk)
  padding = ((0, 0), (0, chunks * chunk - E))

  def split(x_BE, value):
    x = jnp.pad(x_BE, padding, constant_values=value)
    return x.reshape(B, chunks, chunk).swapaxes(0, 1)

  def nothing(parent_Be, token_Be):
    del parent_Be
    return (jnp.zeros(token_Be.shape, dtype),) * count

  @jax.checkpoint
  def one(parent_Be, token_Be):
    return lax.cond(
      (token_Be >= 0).any(), figures_of, nothing, parent_Be, token_Be
    )

  figures = lax.map(
    lambda args: one(*args),
    (split(edge_parent_BE, 0), split(edge_token_BE, -1)),
  )
  return tuple(
    x.swapaxes(0, 1).reshape(B, chunks * chunk)[:, :E] for x in figures
  )


def _token_logprobs(logits_BeV, token_Be):
  """Log-probability of each token and entropy, 0 where the token is -1."""
  norm_Be = jax.nn.logsumexp(logits_BeV, axis=-1)
  token_Be1 = jnp.maximum(token_Be, 0)[..., None]
  chosen_Be = jnp.take_along_axis(logits_BeV, token_Be1, axis=-1)[..., 0]
  fixed_BeV = lax.stop_gradient(logits_BeV)
  fixed_Be = lax.stop_gradient(norm_Be)
  probs_BeV = jnp.exp(fixed_BeV - fixed_Be[..., None])
  entropy_Be = fixed_Be - (probs_BeV * fixed_BeV).sum(-1)
  real_Be = token_Be >= 0
  return (
    jnp.where(real_Be, chosen_Be - norm_Be, 0.0),
    jnp.where(real_Be, entropy_Be, 0.0),
  )


def by_row(x_BE: jax.Array, row_edge_BM: jax.Array) -> jax.Array:
  """A figure of edges as one of rows [B, M]; rows may share an edge."""
  return jnp.take_along_axis(x_BE, row_edge_BM, axis=1)
