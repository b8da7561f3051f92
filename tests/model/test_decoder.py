"""The decoder's own properties; its numbers are in test_golden.py."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib

CONFIG = model_config.ModelConfig(
  vocab_size=41,
  width=24,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_width=20,
  max_context=32,
  qk_norm=True,
  qkv_bias=True,
)


def decoder(**changes):
  return decoder_lib.Decoder(CONFIG, rngs=nnx.Rngs(params=0), **changes)


def tokens(length=9):
  return jax.random.randint(jax.random.key(1), (2, length), 0, 41)


def test_causality_by_zero_gradients():
  graph, embed, rest = nnx.split(
    decoder(), lambda path, _: path[0] == "embed", ...
  )
  length = 7
  position = jnp.arange(length)[None]

  def outputs(table):
    changed = jax.tree.map(lambda _: table, embed)
    made = nnx.merge(graph, changed, rest)
    # Token t is row t of the table, so its gradient is the row's.
    h = made.hidden(position, position, decoder_lib.causal_attend)
    return h.sum(-1)[0]

  table = jax.random.normal(jax.random.key(0), (41, CONFIG.width))
  jacobian = np.asarray(jax.jacobian(outputs)(table))  # [length, 41, width]
  touched = np.abs(jacobian[:, :length]).sum(-1)
  assert (touched[np.triu_indices(length, 1)] == 0).all()
  assert (touched[np.tril_indices(length)] > 0).all()


def test_unrolled_layers_compute_what_scanned_ones_do():
  config = dataclasses.replace(CONFIG, mlp_bias=True)
  made = decoder_lib.Decoder(config, rngs=nnx.Rngs(params=0))
  keys = iter(jax.random.split(jax.random.key(2), 100))
  random = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape)
  nnx.update(made, jax.tree.map(random, nnx.state(made)))  # biases, too
  some = tokens()
  unrolled = decoder_lib.UnrolledDecoder(made)
  position = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
  hidden = unrolled.hidden(some, position, [decoder_lib.causal_attend] * 3)
  np.testing.assert_allclose(
    unrolled.logits(hidden), decoder_lib.causal_logits(made, some), atol=1e-5
  )


def test_bfloat16_layers_keep_a_float32_head():
  made = decoder(dtype=jnp.bfloat16)
  logits = decoder_lib.causal_logits(made, tokens())
  assert logits.dtype == jnp.float32
  exact = decoder_lib.causal_logits(decoder(), tokens())
  np.testing.assert_allclose(logits, exact, atol=0.05)


def test_parameters_survive_a_round_trip_by_name():
  made = decoder()
  params = {
    name: np.asarray(value)
    for name, value in decoder_lib.flatten(nnx.state(made)).items()
  }
  again = decoder_lib.Decoder.from_params(CONFIG, params)
  np.testing.assert_array_equal(
    decoder_lib.causal_logits(again, tokens()),
    decoder_lib.causal_logits(made, tokens()),
  )
  params["layers/mlp/up/kernel"] = params["layers/mlp/up/kernel"][:, :, :-1]
  with pytest.raises(
    errors.CheckpointError, match=r"mlp/up/kernel: .*\(3, 24, 20\).*19"
  ):
    decoder_lib.Decoder.from_params(CONFIG, params)
  del params["layers/mlp/up/kernel"]
  with pytest.raises(errors.CheckpointError, match=r"missing .*mlp/up"):
    decoder_lib.Decoder.from_params(CONFIG, params)


def test_impossible_shapes_are_refused():
  with pytest.raises(errors.ConfigError, match="num_heads=3"):
    model_config.ModelConfig(8, 8, 1, 3, 2, 4, 8, 16)
  with pytest.raises(errors.ConfigError, match="head_dim=5"):
    model_config.ModelConfig(8, 8, 1, 2, 2, 5, 8, 16)
