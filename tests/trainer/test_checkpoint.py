"""Checkpoints: whole or not at all."""

import collections
import dataclasses
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.trainer import checkpoint, update

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny


@pytest.fixture
def state():
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  return update.Updater(
    tiny.decoder(), update.UpdateConfig(), mesh
  ).initial_state()


@pytest.fixture
def checkpointer(tmp_path):
  made = checkpoint.Checkpointer(tmp_path, checkpoint.CheckpointConfig())
  yield made
  made.close()


def equal(a, b):
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_a_checkpoint_gives_back_what_was_saved(checkpointer, state):
  host = {"step": 4, "queue": {"head": 32, "beyond": [34]}}
  checkpointer.save(4, state, host)
  other = jax.tree.map(lambda x: x + 1, state)
  restored, found = checkpointer.restore(other)
  assert equal(restored, state) and not equal(restored, other)
  assert found == host and checkpointer.latest_step == 4


def test_evaluation_reads_the_parameters_alone(checkpointer, state):
  checkpointer.save(2, state, {"step": 2})
  decoder, host = checkpointer.restore_decoder(tiny.decoder(seed=9))
  found = decoder_lib.flatten(decoder_lib.nnx.state(decoder))
  for name, value in decoder_lib.flatten(state.params).items():
    np.testing.assert_array_equal(found[name], value)
  assert host == {"step": 2}


def test_only_the_newest_are_kept(checkpointer, state, tmp_path):
  for step in (1, 2, 3):
    checkpointer.save(step, state, {})
  kept = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert kept == ["3"]


def test_a_full_disk_is_found_before_anything_is_written(
  checkpointer, state, tmp_path, monkeypatch
):
  checkpointer.save(1, state, {})
  usage = collections.namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1_000))
  with pytest.raises(errors.CheckpointError, match=r"step 2 needs .* GB"):
    checkpointer.save(2, state, {})
  kept = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert kept == ["1"] and checkpointer.latest_step == 1


def test_a_write_that_fails_leaves_nothing_behind(
  checkpointer, state, tmp_path, monkeypatch
):
  checkpointer.save(1, state, {})

  def fail(*args, **kwargs):
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpointer._manager, "save", fail)
  with pytest.raises(errors.CheckpointError, match="No space left"):
    checkpointer.save(2, state, {})
  kept = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert kept == ["1"]


def test_a_missing_or_unfit_checkpoint_is_named(checkpointer, state):
  with pytest.raises(errors.CheckpointError, match="no checkpoint"):
    checkpointer.restore(state)
  with pytest.raises(errors.CheckpointError, match="step 7"):
    checkpointer.restore(state, step=7)
  checkpointer.save(1, state, {})
  wrong = jax.tree.map(lambda x: x[..., :1] if x.ndim else x, state)
  with pytest.raises(errors.CheckpointError, match=r"step 1.*expected shape"):
    checkpointer.restore(wrong)
  other = dataclasses.replace(state, opt_state=())
  with pytest.raises(errors.CheckpointError, match=r"step 1.*unknown \["):
    checkpointer.restore(other)
