"""Folders written and read back, with each family's biases; and bad ones."""

import dataclasses
import json
import pathlib
import resource

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import files, huggingface, huggingface_config, params

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_TINY = model_config.ModelConfig(
  vocab_size=13,
  width=12,
  num_layers=3,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  mlp_width=14,
  max_context=64,
  rope_theta=500.0,
)
_Scaling = model_config.RopeScaling
_CONFIGS = {
  "llama": _TINY,
  "llama_biases": dataclasses.replace(
    _TINY,
    tied_embeddings=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    rope_scaling=_Scaling("linear", 2.0, 64),
  ),
  "llama_llama3": dataclasses.replace(
    _TINY, rope_scaling=_Scaling("llama3", 4.0, 16, 1.5, 3.0)
  ),
  "qwen2": dataclasses.replace(_TINY, qkv_bias=True),
  "qwen3": dataclasses.replace(
    _TINY, qk_norm=True, rope_scaling=_Scaling("yarn", 4.0, 16)
  ),
  "qwen3_biases": dataclasses.replace(
    _TINY,
    qk_norm=True,
    qkv_bias=True,
    out_bias=True,
    rope_scaling=_Scaling("yarn", 4.0, 16, 1.0, 4.0, 8.0, 2.0, 1.25),
  ),
}


def _random(config, dtype=np.float32):
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape).astype(dtype)
    for name, shape in params.shapes(config).items()
  }


def _message(folder):
  with pytest.raises(errors.CheckpointError) as caught:
    huggingface.read_huggingface(folder)
  assert str(folder) in str(caught.value)
  return str(caught.value)


def _rewrite_json(path, **changes):
  values = json.loads(path.read_text()) | changes
  path.write_text(
    json.dumps({k: v for k, v in values.items() if v != "absent"})
  )


@pytest.fixture
def folder(tmp_path):
  """A good folder, to be spoilt."""
  huggingface.write_huggingface(tmp_path / "model", _TINY, _random(_TINY))
  return tmp_path / "model"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", _CONFIGS)
def test_a_written_folder_is_read_back(tmp_path, name, dtype):
  config = _CONFIGS[name]
  values = _random(config, dtype)
  target = tmp_path / "deep" / "model"
  huggingface.write_huggingface(target, config, values)
  assert [p.name for p in target.parent.iterdir()] == ["model"]
  assert sorted(p.name for p in target.iterdir()) == [
    "config.json",
    "model.safetensors",
  ]
  found, arrays = files.read_model(target)
  assert found == config
  assert arrays.keys() == values.keys()
  for key, value in values.items():
    assert arrays[key].dtype == np.float32
    np.testing.assert_array_equal(
      arrays[key], value.astype(np.float32), err_msg=key
    )


def test_shards_are_written_and_read_back(tmp_path):
  values = _random(_TINY)
  target = tmp_path / "model"
  huggingface.write_huggingface(target, _TINY, values, shard_bytes=3000)
  shards = sorted(target.glob("model-*.safetensors"))
  assert len(shards) > 3
  assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
  held = [safetensors.numpy.load_file(path) for path in shards]
  sizes = [sum(a.nbytes for a in tensors.values()) for tensors in held]
  assert max(sizes) <= 3000
  index = json.loads((target / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(sizes)
  assert index["weight_map"] == {
    name: path.name
    for path, tensors in zip(shards, held, strict=True)
    for name in tensors
  }
  config, arrays = huggingface.read_huggingface(target)
  assert config == _TINY
  for key, value in values.items():
    np.testing.assert_array_equal(arrays[key], value, err_msg=key)


@pytest.mark.parametrize(
  "path", sorted(_GOLDEN.glob("*/")), ids=lambda p: p.name
)
def test_a_folder_of_transformers_is_written_as_it_was(tmp_path, path):
  config, arrays = huggingface.read_huggingface(path)
  huggingface.write_huggingface(tmp_path / "model", config, arrays)
  ours = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
  theirs = safetensors.numpy.load_file(path / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("name", _CONFIGS)
def test_transformers_understands_a_written_config(tmp_path, name):
  config = _CONFIGS[name]
  values = huggingface_config.to_json(config, "float32")
  (tmp_path / "config.json").write_text(json.dumps(values))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  assert theirs.model_type == name.split("_")[0]
  assert theirs.head_dim == config.head_dim
  assert theirs.tie_word_embeddings == config.tied_embeddings
  assert theirs.rope_parameters["rope_theta"] == config.rope_theta
  # What transformers writes in its turn says the same.
  assert huggingface_config.from_json(theirs.to_dict(), "x") == config


@pytest.mark.parametrize("name", _CONFIGS)
def test_both_generations_of_rotary_keys_are_read(name):
  values = huggingface_config.to_json(_CONFIGS[name], "float32")
  new = {
    k: v for k, v in values.items() if k not in ("rope_theta", "rope_scaling")
  }
  old = {k: v for k, v in values.items() if k != "rope_parameters"}
  if old["rope_scaling"]:  # older still: "type" for "rope_type"
    scaling = dict(old["rope_scaling"])
    scaling["type"] = scaling.pop("rope_type")
    old["rope_scaling"] = scaling
  for form in (new, old):
    assert huggingface_config.from_json(form, "x") == _CONFIGS[name]


def test_a_repeated_tied_head_is_left_out(tmp_path):
  config = dataclasses.replace(_TINY, tied_embeddings=True)
  values = _random(config)
  huggingface.write_huggingface(tmp_path / "model", config, values)
  path = tmp_path / "model" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  safetensors.numpy.save_file(tensors, path)
  _, arrays = huggingface.read_huggingface(tmp_path / "model")
  assert arrays.keys() == values.keys()


def test_a_bad_tensor_is_named(folder):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  name = "model.layers.1.mlp.up_proj.weight"

  def message(changed):
    safetensors.numpy.save_file(changed, path)
    return _message(folder)

  found = message({k: v for k, v in tensors.items() if k != name})
  assert f"1 missing tensor: {name} of shape [14, 12]" in found
  found = message(tensors | {name: np.zeros((12, 14), np.float32)})
  assert f"{name}: expected shape [14, 12], found [12, 14]" in found
  found = message(tensors | {"model.layers.3.mlp.up_proj.weight": np.ones(2)})
  assert "1 unexpected tensor: model.layers.3.mlp.up_proj.weight" in found
  found = message(tensors | {name: np.zeros((14, 12), np.int8)})
  assert f"{name}: expected one of" in found
  assert "found int8" in found


def test_a_bad_file_is_named(folder):
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  for size in (0, 4, 100, len(whole) - 1):
    path.write_bytes(whole[:size])
    assert f"{path}: not a safetensors file, or cut short" in _message(folder)
  path.unlink()
  assert f"{path}: no such file" in _message(folder)
  config = folder / "config.json"
  config.write_text("{")
  assert f"{config}: not JSON" in _message(folder)
  config.write_text("[]")
  assert "expected a JSON object, found list" in _message(folder)
  config.unlink()
  assert f"{config}: cannot be read: No such file" in _message(folder)


def test_a_bad_index_is_named(tmp_path):
  folder = tmp_path / "model"
  huggingface.write_huggingface(folder, _TINY, _random(_TINY), shard_bytes=6000)
  index = folder / "model.safetensors.index.json"
  weight_map = json.loads(index.read_text())["weight_map"]
  last = sorted(folder.glob("model-*"))[-1]
  _rewrite_json(index, weight_map=weight_map | {"lm_head.weight": last.name})
  assert f"{last}: missing tensor lm_head.weight" in _message(folder)
  last.unlink()
  assert f"{last}: no such file" in _message(folder)
  _rewrite_json(index, weight_map="absent")
  assert f"{index}: 'weight_map' is missing" in _message(folder)
  _rewrite_json(index, weight_map={"lm_head.weight": 3})
  assert "does not name files" in _message(folder)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gemma"}, "'gemma' is unknown; expected one of llama"),
    ({"hidden_size": "absent"}, "'hidden_size' is missing"),
    ({"hidden_size": "12"}, "'hidden_size' is '12', expected a number"),
    ({"vocab_size": 1.5}, "'vocab_size' is 1.5, expected a whole number"),
    ({"num_attention_heads": 0}, "is 0, expected a whole number from 1"),
    ({"rope_parameters": [1]}, "are [1], expected an object"),
    ({"num_key_value_heads": 4}, "not a multiple of num_kv_heads=4"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"quantization_config": {"bits": 4}}, "only plain tensors"),
    ({"model_type": "mistral", "sliding_window": 8}, "has no window"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (
      {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
      "rope_type 'dynamic' is unknown; expected one of default, linear",
    ),
    ({"rope_parameters": {"rope_type": "linear"}}, "'factor' is missing"),
    (
      {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
      "'original_max_position_embeddings' is missing",
    ),
    (
      {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
      "mscale: unknown to rope_type 'yarn'",
    ),
  ],
)
def test_a_bad_config_is_named(folder, changes, message):
  _rewrite_json(folder / "config.json", **changes)
  assert message in _message(folder)


def test_what_cannot_be_written_is_named(tmp_path):
  target = tmp_path / "model"
  values = _random(_TINY)

  def message(config, arrays):
    with pytest.raises(errors.CheckpointError) as caught:
      huggingface.write_huggingface(target, config, arrays)
    assert not list(tmp_path.iterdir())
    return str(caught.value)

  found = message(_TINY, {k: v for k, v in values.items() if "head" not in k})
  assert "missing ['head/embedding']" in found
  found = message(_TINY, values | {"final_norm/scale": np.ones(7)})
  assert "final_norm/scale: expected shape (12,), found (7,)" in found
  odd = dataclasses.replace(_TINY, out_bias=True)
  assert "qkv_bias=False, out_bias=True" in message(odd, _random(odd))


def test_an_existing_folder_is_not_overwritten(folder):
  before = (folder / "model.safetensors").read_bytes()
  with pytest.raises(errors.CheckpointError, match="exists already"):
    huggingface.write_huggingface(folder, _TINY, _random(_TINY))
  assert (folder / "model.safetensors").read_bytes() == before


def test_a_failed_write_leaves_nothing(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  # Room for config.json and the first shards' beginning, like a full disk.
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  try:
    with pytest.raises(errors.CheckpointError, match="cannot be written"):
      huggingface.write_huggingface(tmp_path / "model", _TINY, _random(_TINY))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.CheckpointError, match="cannot be written"):
    huggingface.write_huggingface(
      tmp_path / "file" / "model", _TINY, _random(_TINY)
    )
