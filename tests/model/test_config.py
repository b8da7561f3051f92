"""The cost of a model against a count by hand, by its weights and by XLA."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib

SMOLLM2 = model_config.ModelConfig(
  vocab_size=49152,
  width=576,
  num_layers=30,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  mlp_width=1536,
  max_context=8192,
)


def test_flops_of_smollm2_by_hand():
  flops = SMOLLM2.flops()
  # Query and out 576 x 576, key and value 576 x 192, three of 576 x 1536.
  weights = 30 * (2 * 331_776 + 2 * 110_592 + 3 * 884_736)
  assert weights == 106_168_320
  assert flops.token == 6 * weights
  # Forward 2 x 64 for the score and 2 x 64 for the value, in 9 heads.
  assert flops.pair == 3 * (4 * 64) * 9 * 30
  assert flops.edge == 6 * 28_311_552


def test_flops_of_a_token_are_six_per_weight_it_meets():
  state = nnx.state(decoder_lib.abstract(SMOLLM2))
  kernels = [
    leaf.size
    for name, leaf in decoder_lib.flatten(state).items()
    if name.endswith("/kernel")
  ]
  assert len(kernels) == 7
  assert SMOLLM2.flops().token == 6 * sum(kernels)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flops_are_those_that_xla_counts(kv_heads):
  # One layer: XLA counts the body of a loop once. Wide: little else counts.
  config = dataclasses.replace(
    SMOLLM2,
    vocab_size=1024,
    width=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=kv_heads,
    mlp_width=512,
  )
  T = 128

  graph, params = nnx.split(decoder_lib.abstract(config))

  def loss(params, tokens):
    logits = decoder_lib.causal_logits(nnx.merge(graph, params), tokens)
    return (logits**2).sum()

  def counted(function):
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    return jax.jit(function).lower(params, tokens).cost_analysis()["flops"]

  flops = config.flops()
  # Dense attention computes all T * T pairs.
  expected = flops.token * T + flops.pair * T * T + flops.edge * T
  assert counted(loss) == pytest.approx(expected / 3, rel=0.03)
  both = counted(jax.value_and_grad(loss))
  assert both == pytest.approx(expected, rel=0.03)
