"""Sampling on the device: one token a row, with its log-probability."""

import jax
import jax.numpy as jnp

_BLOCK = 256


def sample(
  logits_RV: jnp.ndarray,
  seed_R: jnp.ndarray,
  position_R: jnp.ndarray,
  temperature_R: jnp.ndarray,
  top_k_R: jnp.ndarray,
  top_p_R: jnp.ndarray,
  *,
  filtered: bool,
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """Samples each row from its own distribution with its own random number.

  The random number depends on (seed, position) alone, so that a request's
  tokens do not depend on what else is in the batch.

  Args:
    logits_RV: float32.
    seed_R: uint32, the request's seed.
    position_R: int32, the position of the token to be sampled.
    temperature_R: float32; 0 takes the most likely token.
    top_k_R: int32, 0 for no limit; read when `filtered`.
    top_p_R: float32 in (0, 1]; read when `filtered`.
    filtered: whether any row limits top-k or top-p (the sort is slow).

  Returns:
    token_R int32 and logprob_R float32 under the distribution sampled from
    (of temperature 1 where the temperature is 0).
  """
  greedy_R = temperature_R == 0
  logits_RV = logits_RV / jnp.where(greedy_R, 1.0, temperature_R)[:, None]
  if filtered:
    logits_RV = _filter(logits_RV, top_k_R, top_p_R)
  peak_R = logits_RV.max(-1)
  mass_RV = jnp.exp(logits_RV - peak_R[:, None])
  uniform_R = jax.vmap(
    lambda seed, position: jax.random.uniform(
      jax.random.fold_in(jax.random.key(seed), position)
    )
  )(seed_R, position_R)
  drawn_R, total_R = _draw(mass_RV, uniform_R)
  token_R = jnp.where(greedy_R, logits_RV.argmax(-1), drawn_R)
  chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
  return token_R.astype(jnp.int32), chosen_R - peak_R - jnp.log(total_R)


def _draw(
  mass_RV: jnp.ndarray, uniform_R: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """Inverts the cumulative mass at `uniform * total`, block first.

  Returns the drawn index and the total mass of each row.
  """
  rows, vocab = mass_RV.shape
  blocks = -(-vocab // _BLOCK)
  padded = jnp.pad(mass_RV, ((0, 0), (0, blocks * _BLOCK - vocab)))
  by_block = padded.reshape(rows, blocks, _BLOCK)
  ends = jnp.cumsum(by_block.sum(-1), axis=-1)
  total_R = ends[:, -1]
  goal_R = uniform_R * total_R
  block_R = _first_above(ends, goal_R)
  before_R = jnp.where(
    block_R > 0,
    jnp.take_along_axis(ends, jnp.maximum(block_R - 1, 0)[:, None], 1)[:, 0],
    0.0,
  )
  inside = jnp.take_along_axis(by_block, block_R[:, None, None], 1)[:, 0]
  offset_R = _first_above(jnp.cumsum(inside, axis=-1), goal_R - before_R)
  # Rounding can leave the goal past the block's end, or on a token without
  # mass; the block's likeliest token then stands in.
  has_mass_R = jnp.take_along_axis(inside, offset_R[:, None], 1)[:, 0] > 0
  offset_R = jnp.where(has_mass_R, offset_R, inside.argmax(-1))
  return block_R * _BLOCK + offset_R, total_R


def _first_above(ends: jnp.ndarray, goal_R: jnp.ndarray) -> jnp.ndarray:
  """Index of the first cumulative value above the goal; the last if none."""
  below = (ends <= goal_R[:, None]).sum(-1)
  return jnp.minimum(below, ends.shape[-1] - 1)


def _filter(
  logits_RV: jnp.ndarray, top_k_R: jnp.ndarray, top_p_R: jnp.ndarray
) -> jnp.ndarray:
  """Keeps the top-k tokens, then the smallest head of mass >= top-p."""
  vocab = logits_RV.shape[-1]
  sorted_RV = jnp.sort(logits_RV, axis=-1, descending=True)
  limit_R = jnp.where(top_k_R > 0, jnp.minimum(top_k_R, vocab), vocab)
  rank_1V = jnp.arange(vocab)[None]
  kept_RV = jnp.where(rank_1V < limit_R[:, None], sorted_RV, -jnp.inf)
  probs_RV = jax.nn.softmax(kept_RV, axis=-1)
  before_RV = jnp.cumsum(probs_RV, axis=-1) - probs_RV
  kept_RV = jnp.where(before_RV < top_p_R[:, None], kept_RV, jnp.inf)
  floor_R = jnp.where(jnp.isfinite(kept_RV), kept_RV, jnp.inf).min(-1)
  return jnp.where(logits_RV >= floor_R[:, None], logits_RV, -jnp.inf)
