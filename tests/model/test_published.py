"""Published weights: whole and right, or refused with what is wrong."""

import dataclasses
import json

import numpy as np
import pytest

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import params as params_lib
from forge_jax.model import published

TINY = model_config.ModelConfig(
  vocab_size=13,
  width=12,
  num_layers=3,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  mlp_width=14,
  max_context=64,
)


def random(config=TINY):
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in params_lib.shapes(config).items()
  }


@pytest.fixture
def folder(tmp_path):
  published.write(tmp_path / "v7", TINY, random(), 7)
  return tmp_path / "v7"


def edit(folder, **changes):
  path = folder / published.MANIFEST
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_version_is_read_back_and_leaves_nothing_else(folder):
  found = published.read(folder, TINY, 7)
  for name, array in random().items():
    np.testing.assert_array_equal(found[name], array)
  assert [path.name for path in folder.parent.iterdir()] == ["v7"]
  manifest = json.loads((folder / published.MANIFEST).read_text())
  assert manifest["tensors"]["model.norm.weight"] == {
    "dtype": "float32",
    "shape": [12],
  }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_not_written(tmp_path, value):
  params = random()
  params["layers/mlp/up/kernel"][2, 3, 4] = value
  with pytest.raises(errors.CheckpointError, match="layers/mlp/up/kernel"):
    published.write(tmp_path / "v1", TINY, params, 1)
  assert not list(tmp_path.iterdir())


def test_a_crash_while_writing_leaves_no_version(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(published.disk, "write_json", full)
  with pytest.raises(errors.CheckpointError, match="No space left"):
    published.write(tmp_path / "v1", TINY, random(), 1)
  assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_found(folder):
  path = folder / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[-5] ^= 4
  path.write_bytes(data)
  with pytest.raises(errors.CheckpointError, match=r"safetensors: damaged"):
    published.read(folder, TINY, 7)


def test_half_written_folders_are_found(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(errors.CheckpointError, match="half-written"):
    published.read(folder, TINY, 7)
  path.unlink()
  with pytest.raises(errors.CheckpointError, match="it is absent"):
    published.read(folder, TINY, 7)
  (folder / published.MANIFEST).unlink()
  with pytest.raises(errors.CheckpointError, match="no manifest"):
    published.read(folder, TINY, 7)
  with pytest.raises(errors.CheckpointError, match="no manifest"):
    published.read(folder.parent / "v8", TINY, 7)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"version": 8}, "holds version 8, expected 7"),
    ({"version": "7"}, "'version' is missing or no int"),
    ({"format": "other/2"}, "format 'other/2'"),
    ({"files": {"model.safetensors": 3}}, "says nothing of it"),
    ({"tensors": {}}, r"model.embed_tokens.weight: expected shape \[13, 12\]"),
  ],
)
def test_a_manifest_that_disagrees_is_named(folder, changes, message):
  edit(folder, **changes)
  with pytest.raises(errors.CheckpointError, match=message):
    published.read(folder, TINY, 7)


def test_another_models_weights_are_named_by_the_field(folder):
  other = dataclasses.replace(TINY, rope_theta=500.0)
  with pytest.raises(errors.CheckpointError, match=r"rope_theta=10000\.0"):
    published.read(folder, other, 7)
  # A GGUF file keeps its floats in 32 bits.
  close = dataclasses.replace(TINY, norm_eps=float(np.float32(TINY.norm_eps)))
  published.read(folder, close, 7)
