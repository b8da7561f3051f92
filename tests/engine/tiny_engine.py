"""A tiny random decoder, shared by the engine's tests."""

from flax import nnx

from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib

MODEL = model_config.ModelConfig(
  vocab_size=97,
  width=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=48,
  max_context=128,
)


def decoder(seed=0):
  made = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=seed))
  # Small random logits sample almost uniformly; larger ones tell models apart.
  made.head.embedding.set_value(made.head.embedding.get_value() * 30)
  return made
