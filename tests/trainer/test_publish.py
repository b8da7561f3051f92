"""Versions of weights as folders: what is kept, and what a restart does."""

from flax import nnx
import numpy as np
import pytest
import tiny

from forge_jax import errors, types
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import published
from forge_jax.trainer import publish


def version(number, seed=None):
  state = nnx.state(tiny.decoder(number if seed is None else seed))
  return types.WeightsVersion(number, params=state)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_the_last_versions_stay_and_hold_the_weights(tmp_path):
  config = publish.PublishConfig(str(tmp_path / "weights"), keep=2)
  publisher = publish.Publisher(config, tiny.MODEL)
  for number in (1, 2, 3):
    done = publisher.publish(version(number))
  assert names(tmp_path / "weights") == ["v2", "v3"]
  assert done.version == 3 and done.params is None
  read = published.read(done.path, tiny.MODEL, 3)
  for name, array in decoder_lib.flatten(version(3).params).items():
    np.testing.assert_array_equal(read[name], np.asarray(array))


def test_a_run_that_goes_back_publishes_again(tmp_path):
  config = publish.PublishConfig(str(tmp_path), keep=2)
  publisher = publish.Publisher(config, tiny.MODEL)
  for number in (4, 5):
    publisher.publish(version(number))
  (tmp_path / ".v6.12ab.staged").mkdir()  # a crash while writing
  publisher = publish.Publisher(config, tiny.MODEL)
  publisher.publish(version(4, seed=9))
  assert names(tmp_path) == ["v4"]
  read = published.read(tmp_path / "v4", tiny.MODEL, 4)
  expected = decoder_lib.flatten(version(4, seed=9).params)["embed/embedding"]
  np.testing.assert_array_equal(read["embed/embedding"], np.asarray(expected))


def test_bad_weights_are_not_published(tmp_path):
  publisher = publish.Publisher(
    publish.PublishConfig(str(tmp_path)), tiny.MODEL
  )
  decoder = tiny.decoder()
  scale = decoder.final_norm.scale
  scale.set_value(scale.get_value().at[0].set(np.nan))
  bad = types.WeightsVersion(1, params=nnx.state(decoder))
  with pytest.raises(errors.CheckpointError, match="final_norm/scale"):
    publisher.publish(bad)
  assert names(tmp_path) == []
  with pytest.raises(errors.ConfigError, match="keep=0"):
    publish.PublishConfig("x", keep=0)
