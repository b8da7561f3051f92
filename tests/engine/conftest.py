"""A tiny random model over bytes, and its tokenizer."""

from flax import nnx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
import transformers

from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib

STOP, CALL = 256, 257


@pytest.fixture(scope="session")
def byte_tokenizer():
  """A token a byte, then <|stop|> (256) and <|call|> (257)."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = Tokenizer(
    models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
  )
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_tokens(
    [
      AddedToken(name, special=True, normalized=False)
      for name in ("<|stop|>", "<|call|>")
    ]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, eos_token="<|stop|>"
  )


@pytest.fixture(scope="session")
def byte_decoder():
  """A random model of 260 logits: two more than there are tokens."""
  made = decoder_lib.Decoder(
    model_config.ModelConfig(
      vocab_size=260,
      width=32,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      mlp_width=48,
      max_context=512,
    ),
    rngs=nnx.Rngs(params=0),
  )
  made.head.embedding.set_value(made.head.embedding.get_value() * 30)
  return made
