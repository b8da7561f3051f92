"""Tree attention with a dense [T, T] mask: obvious, the others' oracle."""

import jax
import jax.numpy as jnp

from forge_jax import types


def attention(
  q_BTHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  layout: types.TreeLayout,
  block: int = 0,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `tree_attention`; needs memory for B * H * T * T scores."""
  del block, interpret  # of the implementations that have blocks and kernels
  wide = jnp.promote_types(q_BTHC.dtype, jnp.float32)
  B, T, H, C = q_BTHC.shape
  K = k_BTKC.shape[2]
  q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
  scores = jnp.einsum(
    "btkgc,bskc->bkgts", q_BTKGC, k_BTKC, preferred_element_type=wide
  ) * (C**-0.5)
  scores = jnp.where(visible(layout)[:, None, None], scores, -jnp.inf)
  o_BTKGC = jnp.einsum(
    "bkgts,bskc->btkgc",
    jax.nn.softmax(scores, axis=-1).astype(v_BTKC.dtype),
    v_BTKC,
    preferred_element_type=wide,
  )
  return o_BTKGC.reshape(B, T, H, C).astype(q_BTHC.dtype)


def visible(layout: types.TreeLayout) -> jax.Array:
  """Bool [B, T, T]: whether query t (axis 1) sees key s (axis 2)."""
  end_BT = layout.subtree_end_BT
  index_T = jnp.arange(end_BT.shape[1])
  causal_TT = index_T[None, :] <= index_T[:, None]
  return causal_TT[None] & (index_T[None, :, None] < end_BT[:, None, :])
