"""Nothing acknowledged is lost, nothing damaged goes unnoticed."""

import errno
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading

import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import segment, store


def fill(path, count, segment_bytes=2**20):
  """Stores groups 0..count-1 and returns the segment files."""
  config = store.PoolConfig(segment_bytes=segment_bytes)
  with store.DataPool.open(path, config) as pool:
    for index in range(count):
      pool.append(sample_groups.make_group(index, seed=index))
  return sorted(path.glob("segment-*.log"))


def assert_holds(pool, indices):
  assert pool.indices() == list(indices)
  for index in indices:
    expected = sample_groups.make_group(index, seed=index)
    sample_groups.assert_same(expected, pool.get(index))


@pytest.mark.parametrize("segment_bytes", [1, 5000, 2**20])
def test_groups_survive_reopening_and_rotation(tmp_path, segment_bytes):
  files = fill(tmp_path / "a" / "pool", 7, segment_bytes)
  assert (len(files) > 1) == (segment_bytes < 2**20)
  with store.DataPool.open(tmp_path / "a" / "pool") as pool:
    assert_holds(pool, range(7))
    pool.append(sample_groups.make_group(9, seed=9))
    assert len(pool) == 8 and 9 in pool and 8 not in pool
  with store.DataPool.open(tmp_path / "a" / "pool", readonly=True) as pool:
    assert_holds(pool, [*range(7), 9])


def test_a_second_append_of_an_index_changes_nothing(tmp_path):
  (file,) = fill(tmp_path, 1)
  size = file.stat().st_size
  with store.DataPool.open(tmp_path) as pool:
    pool.append(sample_groups.make_group(0, seed=99))
    assert file.stat().st_size == size
    assert_holds(pool, [0])


def test_an_append_is_synced_before_it_returns(tmp_path, monkeypatch):
  calls = []
  sync, write = os.fsync, os.write

  def note_sync(descriptor):
    calls.append("sync folder" if is_folder(descriptor) else "sync")
    sync(descriptor)

  def note_write(descriptor, data):
    calls.append("write")
    return write(descriptor, data)

  def is_folder(descriptor):
    return pathlib.Path(f"/proc/self/fd/{descriptor}").resolve().is_dir()

  monkeypatch.setattr(os, "fsync", note_sync)
  monkeypatch.setattr(os, "write", note_write)
  with store.DataPool.open(tmp_path / "pool") as pool:
    assert calls == ["sync folder"]  # the parent of the folder just made
    calls.clear()
    pool.append(sample_groups.make_group(0))
    assert calls == ["sync folder", "write", "write", "sync"]
    calls.clear()
    pool.append(sample_groups.make_group(1))
    assert calls == ["write", "write", "sync"]


def test_a_torn_tail_is_cut_with_a_warning(tmp_path, caplog):
  """Every length that a killed writer may leave behind of its last record."""
  (file,) = fill(tmp_path, 3)
  whole = file.read_bytes()
  places, _ = segment.scan(file)
  start = places[2].offset
  lengths = [1, segment.HEADER_BYTES - 1, segment.HEADER_BYTES, 500]
  lengths.append(len(whole) - start - 1)
  for length in lengths:
    file.write_bytes(whole[: start + length])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      pool = store.DataPool.open(tmp_path)
    with pool:
      assert f"{file}" in caplog.text and f"{length} bytes" in caplog.text
      assert_holds(pool, range(2))
      pool.append(sample_groups.make_group(2, seed=2))
    assert file.read_bytes() == whole


def test_a_reader_leaves_a_torn_tail_alone(tmp_path):
  (file,) = fill(tmp_path, 2)
  torn = file.read_bytes()[:-3]
  file.write_bytes(torn)
  with store.DataPool.open(tmp_path, readonly=True) as pool:
    assert_holds(pool, range(1))
    with pytest.raises(errors.PoolError, match="read-only"):
      pool.append(sample_groups.make_group(5))
  assert file.read_bytes() == torn


def test_every_flipped_bit_is_noticed(tmp_path, caplog):
  """In the middle it is an error; at the end the record is cut, loudly."""
  (file,) = fill(tmp_path, 3)
  whole = file.read_bytes()
  places, _ = segment.scan(file)
  rng = random.Random(0)
  header_bits = rng.sample(range(segment.HEADER_BYTES * 8), 40)
  for place in places:
    payload_bits = rng.sample(range(place.length * 8), 10)
    bits = header_bits + [segment.HEADER_BYTES * 8 + b for b in payload_bits]
    for bit in bits:
      damaged = bytearray(whole)
      damaged[place.offset + bit // 8] ^= 1 << bit % 8
      file.write_bytes(damaged)
      caplog.clear()
      if place is places[-1]:
        with store.DataPool.open(tmp_path) as pool:
          assert_holds(pool, range(2))
        assert f"{file}" in caplog.text
      else:
        with pytest.raises(errors.PoolError, match=f"byte {place.offset}") as e:
          store.DataPool.open(tmp_path)
        assert str(file) in str(e.value)
        assert file.read_bytes() == damaged


def test_damage_after_opening_is_noticed_by_get(tmp_path):
  (file,) = fill(tmp_path, 2)
  with store.DataPool.open(tmp_path) as pool:
    data = bytearray(file.read_bytes())
    data[segment.HEADER_BYTES + 700] ^= 4
    file.write_bytes(data)
    with pytest.raises(errors.PoolError, match="group 0 at byte 0 has changed"):
      pool.get(0)
    pool.get(1)


def test_a_short_segment_before_the_last_is_an_error(tmp_path):
  first, *_ = fill(tmp_path, 3, segment_bytes=1)
  first.write_bytes(first.read_bytes()[:-1])
  with pytest.raises(errors.PoolError, match="later segment") as caught:
    store.DataPool.open(tmp_path)
  assert str(first) in str(caught.value)


def test_a_missing_segment_is_an_error(tmp_path):
  _, second, _ = fill(tmp_path, 3, segment_bytes=1)
  second.unlink()
  with pytest.raises(errors.PoolError, match="segments are missing"):
    store.DataPool.open(tmp_path)


def test_a_record_of_a_newer_format_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(segment, "FORMAT_VERSION", 2)
  fill(tmp_path, 1)
  monkeypatch.undo()
  with pytest.raises(errors.PoolError, match="format 2"):
    store.DataPool.open(tmp_path)


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
  fill(tmp_path, 1)
  with store.DataPool.open(tmp_path) as pool:
    with pytest.raises(errors.PoolError, match=f"process {os.getpid()}"):
      store.DataPool.open(tmp_path)
    with store.DataPool.open(tmp_path, readonly=True) as reader:
      assert_holds(reader, [0])
    pool.append(sample_groups.make_group(1, seed=1))
  store.DataPool.open(tmp_path).close()


def test_places_that_cannot_be_a_pool(tmp_path):
  with pytest.raises(errors.PoolError, match="no pool"):
    store.DataPool.open(tmp_path / "none", readonly=True)
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.PoolError, match="cannot be opened"):
    store.DataPool.open(tmp_path / "file")
  with pytest.raises(errors.ConfigError, match="segment_bytes is 0"):
    store.PoolConfig(segment_bytes=0)


def test_unknown_groups_and_closed_pools_are_named(tmp_path):
  fill(tmp_path, 2)
  pool = store.DataPool.open(tmp_path)
  with pytest.raises(errors.PoolError, match="group 5 is not among its 2"):
    pool.get(5)
  pool.close()
  pool.close()
  with pytest.raises(errors.PoolError, match="closed"):
    pool.append(sample_groups.make_group(2))


@pytest.mark.parametrize("segment_bytes", [1, 2**20])
@pytest.mark.parametrize("room", [0, 20, segment.HEADER_BYTES, 500])
def test_a_full_disk_leaves_the_pool_good(
  tmp_path, monkeypatch, segment_bytes, room
):
  write = os.write

  def write_until_full(descriptor, data):
    nonlocal left
    if not left:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = write(descriptor, data[:left])
    left -= written
    return written

  fill(tmp_path, 2, segment_bytes)
  config = store.PoolConfig(segment_bytes=segment_bytes)
  with store.DataPool.open(tmp_path, config) as pool:
    for _ in range(2):
      left = room
      monkeypatch.setattr(os, "write", write_until_full)
      with pytest.raises(errors.PoolError, match=r"group 2 .*No space left"):
        pool.append(sample_groups.make_group(2, seed=2))
      monkeypatch.undo()
      assert_holds(pool, range(2))
    with store.DataPool.open(tmp_path, readonly=True) as reader:
      assert_holds(reader, range(2))
    pool.append(sample_groups.make_group(2, seed=2))
    assert_holds(pool, range(3))
  with store.DataPool.open(tmp_path) as pool:
    assert_holds(pool, range(3))


def test_nothing_is_written_after_a_failed_sync(tmp_path, monkeypatch):
  def fail(descriptor):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  fill(tmp_path, 1)
  pool = store.DataPool.open(tmp_path)
  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(errors.PoolError, match="Input/output error"):
    pool.append(sample_groups.make_group(1, seed=1))
  monkeypatch.undo()
  with pytest.raises(errors.PoolError, match=r"group 1 .* a sync of"):
    pool.append(sample_groups.make_group(1, seed=1))
  pool.close()
  with store.DataPool.open(tmp_path) as pool:
    assert_holds(pool, range(1))


def test_threads_may_append_and_read_at_once(tmp_path):
  failures = []

  def work(pool, worker):
    try:
      for index in range(worker, 40, 4):
        pool.append(sample_groups.make_group(index, seed=index))
        assert pool.get(index).index == index
    except (AssertionError, errors.PoolError) as failure:
      failures.append(failure)

  with store.DataPool.open(tmp_path, store.PoolConfig(9000)) as pool:
    threads = [
      threading.Thread(target=work, args=(pool, worker)) for worker in range(4)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not failures
    assert_holds(pool, range(40))
  with store.DataPool.open(tmp_path) as pool:
    assert pool.indices() == list(range(40))


_WRITER = """
import sys
import sample_groups
from forge_jax.pool import store
pool = store.DataPool.open(sys.argv[1], store.PoolConfig(200_000))
index = len(pool)
print("open", flush=True)
while True:
  pool.append(sample_groups.make_group(index, turns=30, seed=index))
  print(index, flush=True)
  index += 1
"""


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path):
  """Eight rounds of a child that is killed at a random instant."""
  folder = pathlib.Path(__file__).parent
  root = folder.parent.parent
  environ = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{folder}"}
  rng = random.Random(1)
  acknowledged = -1
  for _ in range(8):
    with subprocess.Popen(
      [sys.executable, "-c", _WRITER, str(tmp_path)],
      stdout=subprocess.PIPE,
      env=environ,
      text=True,
    ) as child:
      assert child.stdout.readline() == "open\n"
      killer = threading.Timer(
        rng.uniform(0.0, 0.15), child.send_signal, (signal.SIGKILL,)
      )
      killer.start()
      lines = child.stdout.read().split("\n")
      killer.join()
    assert child.returncode == -signal.SIGKILL
    # A line that was cut off has not told anything.
    acknowledged = max([acknowledged, *map(int, lines[:-1])])
    with store.DataPool.open(tmp_path, readonly=True) as pool:
      indices = pool.indices()
      # One more than acknowledged may be whole, never less.
      assert indices in (
        list(range(acknowledged + 1)),
        list(range(acknowledged + 2)),
      )
      for index in indices:
        assert pool.get(index).index == index
      acknowledged = max([acknowledged, *indices])
  assert acknowledged > 0
