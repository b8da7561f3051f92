"""A model to begin with, where there is none: random weights."""

import dataclasses
import pathlib

from flax import nnx
import numpy as np

from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import huggingface


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
  """A small model, and what its tokenizer is made from."""

  vocab_size: int = 512  # most tokens
  episodes: int = 64  # of each domain, whose texts the tokenizer is made from
  width: int = 128
  num_layers: int = 2
  num_heads: int = 4
  mlp_width: int = 256
  max_context: int = 1024

  def shape(self, vocab_size: int) -> model_config.ModelConfig:
    """The model of a tokenizer of so many tokens."""
    return model_config.ModelConfig(
      vocab_size=vocab_size,
      width=self.width,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_heads,
      head_dim=self.width // self.num_heads,
      mlp_width=self.mlp_width,
      max_context=self.max_context,
      tied_embeddings=True,
      qk_norm=True,
    )


def write(
  folder: pathlib.Path, shape: model_config.ModelConfig, seed: int
) -> None:
  """Writes random weights as a Hugging Face folder, without a tokenizer.

  Raises:
    CheckpointError: the folder exists or cannot be written.
  """
  decoder = decoder_lib.Decoder(shape, rngs=nnx.Rngs(params=seed))
  params = decoder_lib.flatten(nnx.state(decoder))
  huggingface.write_huggingface(
    folder, shape, {name: np.asarray(x) for name, x in params.items()}
  )
