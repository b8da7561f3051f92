"""Modules that draft: what they may see, how they begin, how they are kept."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import huggingface, mtp
from forge_jax.model import params as params_lib

MODEL = model_config.ModelConfig(
  vocab_size=64,
  width=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=48,
  max_context=64,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (1, 9))


def decoder(modules=2, **kwargs):
  plain = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0))
  return mtp.grow(plain, modules, rngs=nnx.Rngs(params=1), **kwargs)


def states(model, trunk):
  position = jnp.arange(trunk.shape[1])[None]
  return mtp.hidden(
    model, trunk, TOKENS, position - 1, position, decoder_lib.causal_attend
  )


def trunk_of(model):
  position = jnp.arange(TOKENS.shape[1])[None]
  return model.hidden(TOKENS, position, decoder_lib.causal_attend)


@pytest.mark.parametrize("module", [0, 1])
def test_a_module_sees_the_trunk_only_as_far_back_as_it_drafts(module):
  model = decoder()
  at = 6
  read = lambda trunk: states(model, trunk)[module][0, at].sum()
  seen = jnp.abs(jax.grad(read)(trunk_of(model))[0]).sum(-1)
  latest = at - 1 - module
  assert (seen[: latest + 1] > 0).all()
  assert not seen[latest + 1 :].any()


def test_a_copied_module_has_the_last_layer_and_a_fresh_one_does_not():
  copied, fresh = decoder(), decoder(init="fresh")
  for model, same in ((copied, True), (fresh, False)):
    params = decoder_lib.flatten(nnx.state(model))
    last = params["layers/mlp/up/kernel"][-1]
    for number in range(2):
      kernel = params[f"mtp/{number}/layer/mlp/up/kernel"]
      assert np.array_equal(kernel, last) == same
  with pytest.raises(errors.ConfigError, match="mtp_init='none'"):
    decoder(init="none")


def test_the_trunk_is_what_it_was():
  plain = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0))
  np.testing.assert_array_equal(trunk_of(decoder()), trunk_of(plain))


def test_modules_are_written_and_read_back(tmp_path):
  model = decoder(modules=3)
  params = {
    name: np.asarray(x)
    for name, x in decoder_lib.flatten(nnx.state(model)).items()
  }
  params_lib.check(model.config, params)
  huggingface.write_huggingface(tmp_path / "m", model.config, params)
  config, found = huggingface.read_huggingface(tmp_path / "m")
  assert config == model.config
  for name, value in params.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_negative_number_of_modules_is_refused():
  with pytest.raises(errors.ConfigError, match="mtp_modules=-1"):
    dataclasses.replace(MODEL, mtp_modules=-1)
