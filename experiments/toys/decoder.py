"""A decoder that is small enough to sample and train in seconds."""

import jax
import jax.numpy as jnp

from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib


def config(vocab_size: int) -> model_config.ModelConfig:
  """Two layers of width 32."""
  return model_config.ModelConfig(
    vocab_size=vocab_size,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_context=256,
  )


def logprobs(decoder: decoder_lib.Decoder, tokens_BT: jax.Array) -> jax.Array:
  """Log-probabilities [B, T, V] of what follows each token."""
  position_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
  )
  hidden = decoder.hidden(tokens_BT, position_BT, _attend)
  return jax.nn.log_softmax(decoder.logits(hidden))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention over whole rows."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)
