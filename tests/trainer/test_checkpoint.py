"""Checkpoints: whole or not at all."""

import collections
import dataclasses
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.trainer import checkpoint, manifest, update

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
  checkpointer.wait()
  other = jax.tree.map(lambda x: x + 1, state)
  restored, found = checkpointer.restore(other)
  assert equal(restored, state) and not equal(restored, other)
  assert found == host and checkpointer.latest_step == 4


def test_evaluation_reads_the_parameters_alone(checkpointer, state):
  checkpointer.save(2, state, {"step": 2})
  checkpointer.wait()
  decoder, host = checkpointer.restore_decoder(tiny.decoder(seed=9))
  found = decoder_lib.flatten(decoder_lib.nnx.state(decoder))
  for name, value in decoder_lib.flatten(state.params).items():
    np.testing.assert_array_equal(found[name], value)
  assert host == {"step": 2}


def test_a_state_may_change_as_soon_as_it_is_being_saved(checkpointer, state):
  """The arrays' buffers are given to the next step while they are written."""
  before = jax.tree.map(np.array, state)
  change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  checkpointer.save(1, state, {})
  jax.block_until_ready(change(state))
  checkpointer.wait()
  restored, _ = checkpointer.restore(before)
  assert equal(restored, before)


def names(folder):
  return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
  "keep, keep_every, left",
  [(1, 0, ["6"]), (2, 0, ["5", "6"]), (1, 2, ["2", "4", "6"])],
)
def test_the_policy_says_what_is_kept(state, tmp_path, keep, keep_every, left):
  config = checkpoint.CheckpointConfig(keep=keep, keep_every=keep_every)
  checkpointer = checkpoint.Checkpointer(tmp_path, config)
  for step in range(1, 7):
    checkpointer.save(step, state, {})
  checkpointer.close()
  assert names(tmp_path / "checkpoints") == left


def test_the_old_one_stays_until_the_new_one_counts(
  state, tmp_path, monkeypatch
):
  made = checkpoint.Checkpointer(tmp_path, checkpoint.CheckpointConfig(keep=1))
  made.save(1, state, {})
  made.wait()
  seen = []
  write = manifest.write

  def look(folder):
    seen.append(names(tmp_path / "checkpoints"))
    write(folder)
    seen.append(names(tmp_path / "checkpoints"))

  monkeypatch.setattr(manifest, "write", look)
  made.save(2, state, {})
  made.close()
  assert seen == [["1", "2"]] * 2
  assert names(tmp_path / "checkpoints") == ["2"]


def test_one_without_a_manifest_does_not_count(checkpointer, state, tmp_path):
  for step in (1, 2):
    checkpointer.save(step, state, {"step": step})
  checkpointer.wait()
  (tmp_path / "checkpoints" / "2" / manifest.NAME).unlink()
  assert checkpointer.latest_step == 1
  _, host = checkpointer.restore(state)
  assert host == {"step": 1}
  checkpointer.save(2, state, {"step": 2})
  checkpointer.wait()
  assert checkpointer.restore(state)[1] == {"step": 2}


def damage(path, rng):
  """Flips a bit of a file, or cuts it."""
  data = bytearray(path.read_bytes())
  if rng.random() < 0.5:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  else:
    del data[rng.randrange(len(data)) :]
  path.write_bytes(data)


def test_damage_anywhere_falls_back_to_the_newest_good_one(
  checkpointer, state, tmp_path, caplog
):
  for step in (1, 2):
    checkpointer.save(step, state, {"step": step})
  checkpointer.wait()
  folder = tmp_path / "checkpoints"
  kept = tmp_path / "kept"
  shutil.copytree(folder, kept)
  rng = random.Random(0)
  files = [p.relative_to(kept) for p in (kept / "2").rglob("*") if p.is_file()]
  for name in [n for n in files if (kept / n).stat().st_size]:
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    damage(folder / name, rng)
    caplog.clear()
    restored, host = checkpointer.restore(state)
    assert host == {"step": 1} and equal(restored, state), name
    assert "DAMAGED checkpoint of step 2" in caplog.text
    assert name.name in caplog.text and "FALLING BACK" in caplog.text
    assert names(folder) == ["1", "2.damaged"]


def test_damaged_ones_do_not_displace_good_ones(checkpointer, state, tmp_path):
  for step in (10, 20):
    checkpointer.save(step, state, {})
  checkpointer.wait()
  (tmp_path / "checkpoints" / "20" / "host" / "metadata").write_text("{}x")
  checkpointer.restore(state)
  for step in (13, 15):
    checkpointer.save(step, state, {})
  checkpointer.wait()
  assert names(tmp_path / "checkpoints") == ["13", "15", "20.damaged"]


def test_evaluation_falls_back_and_changes_nothing(
  checkpointer, state, tmp_path
):
  for step in (1, 2):
    checkpointer.save(step, state, {"step": step})
  checkpointer.wait()
  (tmp_path / "checkpoints" / "2" / "host" / "metadata").write_text("{}x")
  _, host = checkpointer.restore_decoder(tiny.decoder())
  assert host == {"step": 1}
  assert names(tmp_path / "checkpoints") == ["1", "2"]


def test_when_none_is_good_nothing_is_restored(checkpointer, state, tmp_path):
  checkpointer.save(1, state, {})
  checkpointer.wait()
  (tmp_path / "checkpoints" / "1" / "extra").write_text("")
  with pytest.raises(
    errors.CheckpointError, match=r"no checkpoint in .* is good; damaged: 1"
  ):
    checkpointer.restore(state)
  with pytest.raises(errors.CheckpointError, match=r"of step 1 in .* is good"):
    checkpointer.restore(state, step=1)


def test_coreutils_read_the_manifest(checkpointer, state, tmp_path):
  checkpointer.save(1, state, {})
  checkpointer.wait()
  done = subprocess.run(
    ["sha256sum", "--check", "--strict", "--quiet", manifest.NAME],
    cwd=tmp_path / "checkpoints" / "1",
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "field, value", [("keep", 0), ("every", -1), ("keep_every", -1)]
)
def test_a_policy_that_cannot_be_is_refused(field, value):
  with pytest.raises(errors.ConfigError, match=f"{field} is {value}"):
    checkpoint.CheckpointConfig(**{field: value})


def test_a_full_disk_is_found_before_anything_is_written(
  checkpointer, state, tmp_path, monkeypatch
):
  checkpointer.save(1, state, {})
  checkpointer.wait()
  usage = collections.namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1_000))
  with pytest.raises(errors.CheckpointError, match=r"step 2 needs .* GB"):
    checkpointer.save(2, state, {})
  assert (
    names(tmp_path / "checkpoints") == ["1"] and checkpointer.latest_step == 1
  )


def test_a_write_that_fails_leaves_nothing_behind(
  checkpointer, state, tmp_path, monkeypatch
):
  checkpointer.save(1, state, {})
  checkpointer.wait()

  def fail(*args, **kwargs):
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpointer._orbax, "save", fail)
  with pytest.raises(errors.CheckpointError, match="No space left"):
    checkpointer.save(2, state, {})
  assert names(tmp_path / "checkpoints") == ["1"]


def test_a_write_that_fails_in_the_background_is_raised_later(
  checkpointer, state, tmp_path, monkeypatch
):
  def fail(folder):
    raise OSError(28, "No space left on device")

  checkpointer.save(1, state, {})
  checkpointer.wait()
  monkeypatch.setattr(manifest, "write", fail)
  checkpointer.save(2, state, {})
  with pytest.raises(errors.CheckpointError, match=r"step 2 .*No space left"):
    checkpointer.save(3, state, {})
  monkeypatch.undo()
  assert names(tmp_path / "checkpoints") == ["1"]
  checkpointer.save(3, state, {})
  checkpointer.wait()
  assert checkpointer.latest_step == 3


def test_a_missing_or_unfit_checkpoint_is_named(checkpointer, state):
  with pytest.raises(errors.CheckpointError, match="no checkpoint"):
    checkpointer.restore(state)
  with pytest.raises(errors.CheckpointError, match="step 7"):
    checkpointer.restore(state, step=7)
  checkpointer.save(1, state, {})
  checkpointer.wait()
  wrong = jax.tree.map(lambda x: x[..., :1] if x.ndim else x, state)
  with pytest.raises(errors.CheckpointError, match=r"step 1.*expected shape"):
    checkpointer.restore(wrong)
  other = dataclasses.replace(state, opt_state=())
  with pytest.raises(errors.CheckpointError, match=r"step 1.*unknown \["):
    checkpointer.restore(other)
