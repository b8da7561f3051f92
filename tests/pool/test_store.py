"""Nothing acknowledged is lost, nothing damaged goes unnoticed."""

import errno
import logging
import os
import random
import shutil
import threading
import time

import full_disk
import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import segment, store


def fill(path, count, segment_bytes=2**20):
  """Stores groups 0..count-1 and returns the segment files."""
  config = store.PoolConfig(segment_bytes=segment_bytes)
  with store.DataPool.open(path, config) as pool:
    for index in range(count):
      pool.append(sample_groups.make_group(index, seed=index))
  return sorted(path.glob("segment-*.log"))


def lose_index(path):
  """What was acknowledged is no longer known."""
  for file in path.glob("index.*"):
    file.unlink()


def assert_holds(pool, indices):
  assert pool.indices() == list(indices)
  for index in indices:
    expected = sample_groups.make_group(index, seed=index)
    sample_groups.assert_same(expected, pool.get(index))


def test_an_append_is_synced_before_its_row_is_committed(tmp_path, monkeypatch):
  calls = []

  def note(name, function):
    def call(*arguments, **named):
      done = function(*arguments, **named)
      calls.append(name)
      return done

    return call

  monkeypatch.setattr(os, "writev", note("write", os.writev))
  monkeypatch.setattr(os, "fdatasync", note("sync", os.fdatasync))
  monkeypatch.setattr(segment, "sync_folder", note("folder", lambda path: None))
  with store.DataPool.open(tmp_path / "pool") as pool:
    assert "folder" in calls  # the parent of the folder just made
    monkeypatch.setattr(pool.index, "add", note("commit", pool.index.add))
    calls.clear()
    pool.append(sample_groups.make_group(0))
    assert calls == ["folder", "write", "sync", "commit"]
    calls.clear()
    pool.append(sample_groups.make_group(1))
    assert calls == ["write", "sync", "commit"]
  monkeypatch.undo()
  mode = "PRAGMA synchronous"
  with store.DataPool.open(tmp_path / "pool") as pool:
    assert pool.index.database.execute(mode).fetchall() == [(2,)]  # FULL


def test_a_torn_tail_is_cut_with_a_warning(tmp_path, caplog):
  """Every length that a killed writer may leave behind of its last record."""
  (file,) = fill(tmp_path, 3)
  whole = file.read_bytes()
  start = list(segment.scan(file))[2].place.offset
  lengths = [1, segment.HEADER_BYTES - 1, segment.HEADER_BYTES, 500]
  lengths.append(len(whole) - start - 1)
  for length in lengths:
    file.write_bytes(whole[: start + length])
    lose_index(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      pool = store.DataPool.open(tmp_path)
    with pool:
      assert f"{file}" in caplog.text and f" {length} bytes" in caplog.text
      assert_holds(pool, range(2))
      pool.append(sample_groups.make_group(2, seed=2))
      assert_holds(pool, range(3))


def test_a_reader_leaves_a_torn_tail_alone(tmp_path):
  (file,) = fill(tmp_path, 2)
  torn = file.read_bytes()[:-3]
  file.write_bytes(torn)
  with store.DataPool.open(tmp_path, readonly=True) as pool:
    assert_holds(pool, range(1))
    with pytest.raises(errors.PoolError, match="read-only"):
      pool.append(sample_groups.make_group(5))
  assert file.read_bytes() == torn


@pytest.mark.parametrize("lost_index", [False, True])
def test_damage_of_acknowledged_records_is_noticed(
  tmp_path, caplog, lost_index
):
  """By opening, where the header shows it; else by reading the group."""
  (file,) = fill(tmp_path / "pool", 3)
  rng = random.Random(0)
  places = [e.place for e in segment.scan(file)]
  for trial in range(40):
    copy = tmp_path / f"copy{trial}"
    shutil.copytree(tmp_path / "pool", copy)
    if lost_index:
      lose_index(copy)
    damaged = bytearray(file.read_bytes())
    number = rng.randrange(2)  # the last one may be taken for torn
    place = places[number]
    length = rng.choice([segment.HEADER_BYTES, place.length])
    damaged[place.offset + rng.randrange(length)] ^= 1 << rng.randrange(8)
    (copy / file.name).write_bytes(damaged)
    try:
      with store.DataPool.open(copy) as pool:
        with pytest.raises(errors.PoolError, match=f"group {number} is dam"):
          pool.get(number)
        assert_holds_all_but(pool, number)
    except errors.PoolError as error:
      assert lost_index
      assert f"byte {place.offset}," in str(error)
    assert (copy / file.name).read_bytes() == damaged


def assert_holds_all_but(pool, number):
  for index in {0, 1, 2} - {number}:
    expected = sample_groups.make_group(index, seed=index)
    sample_groups.assert_same(expected, pool.get(index))


def test_a_damaged_last_record_is_an_error_only_if_it_was_acknowledged(
  tmp_path, caplog
):
  (file,) = fill(tmp_path, 3)
  damaged = bytearray(file.read_bytes())
  damaged[-5] ^= 4
  file.write_bytes(damaged)
  (tmp_path / "index.clean").unlink()  # as after a crash
  with (
    store.DataPool.open(tmp_path) as pool,
    pytest.raises(errors.PoolError, match="group 2 is damaged"),
  ):
    pool.get(2)
  lose_index(tmp_path)
  with store.DataPool.open(tmp_path) as pool:
    assert_holds(pool, range(2))
  assert "torn tail" in caplog.text


@pytest.mark.parametrize("clean", [False, True])
def test_a_damaged_index_is_made_again(tmp_path, clean, caplog):
  fill(tmp_path / "pool", 4, segment_bytes=5000)
  size = (tmp_path / "pool" / "index.sqlite").stat().st_size
  rng = random.Random(1)
  for trial in range(20):
    copy = tmp_path / f"copy{trial}"
    shutil.copytree(tmp_path / "pool", copy)
    data = bytearray((copy / "index.sqlite").read_bytes())
    if trial % 4:
      data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    else:
      del data[rng.randrange(size) :]
    (copy / "index.sqlite").write_bytes(data)
    if not clean:
      (copy / "index.clean").unlink()
    caplog.clear()
    with store.DataPool.open(copy) as pool:
      assert_holds(pool, range(4))
    assert ("does not agree" in caplog.text) == clean


def test_damage_to_the_last_byte_of_what_vouches_for_the_index(
  tmp_path, caplog
):
  fill(tmp_path, 2)
  for spoil in (lambda data: data[:-1], lambda data: data[:-1] + b"\x0b"):
    clean = tmp_path / "index.clean"
    clean.write_bytes(spoil(clean.read_bytes()))
    caplog.clear()
    with store.DataPool.open(tmp_path) as pool:
      assert_holds(pool, range(2))
    assert "does not agree" in caplog.text


def test_a_short_segment_is_an_error(tmp_path):
  first, *_ = fill(tmp_path, 3, segment_bytes=1)
  first.write_bytes(first.read_bytes()[:-1])
  with pytest.raises(errors.PoolError, match="incomplete record") as caught:
    store.DataPool.open(tmp_path)
  assert str(first) in str(caught.value)


def test_an_acknowledged_record_that_is_cut_off_is_an_error(tmp_path):
  (file,) = fill(tmp_path, 3)
  last = list(segment.scan(file))[-1].place
  file.write_bytes(file.read_bytes()[: last.offset])
  (tmp_path / "index.clean").unlink()
  with pytest.raises(errors.PoolError, match=f"{last.length} acknowledged"):
    store.DataPool.open(tmp_path)


def test_a_missing_segment_is_an_error(tmp_path):
  _, second, third = fill(tmp_path, 3, segment_bytes=1)
  saved = second.read_bytes()
  second.unlink()
  with pytest.raises(errors.PoolError, match=r"00000001\.log is missing"):
    store.DataPool.open(tmp_path)
  second.write_bytes(saved)
  third.unlink()
  with pytest.raises(errors.PoolError, match=r"00000002\.log is missing"):
    store.DataPool.open(tmp_path)


def test_other_formats_are_refused_by_name(tmp_path, monkeypatch):
  monkeypatch.setattr(segment, "FORMAT_VERSION", 3)
  fill(tmp_path / "new", 1)
  monkeypatch.undo()
  with pytest.raises(errors.PoolError, match="format 3"):
    store.DataPool.open(tmp_path / "new", readonly=True)
  monkeypatch.setattr(index_lib, "SCHEMA_VERSION", 7)
  fill(tmp_path / "schema", 1)
  monkeypatch.undo()
  for crashed in (False, True):
    if crashed:
      (tmp_path / "schema/index.clean").unlink(missing_ok=True)
    # Not once, and then made again as one of ours.
    for _ in range(2):
      with pytest.raises(errors.PoolError, match="schema version 7"):
        store.DataPool.open(tmp_path / "schema")


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


def test_an_index_without_space_is_waited_for(tmp_path, caplog):
  with store.DataPool.open(tmp_path) as pool:
    database = pool.index.database
    (pages,) = database.execute("PRAGMA page_count").fetchall()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")
    thread = threading.Thread(
      target=lambda: [
        pool.append(sample_groups.make_group(i, seed=i)) for i in range(60)
      ]
    )
    thread.start()
    while " is full" not in caplog.text and "No space" not in caplog.text:
      assert thread.is_alive()
      time.sleep(0.01)
    database.execute("PRAGMA max_page_count = 100000")
    thread.join()
    assert_holds(pool, range(60))
  with store.DataPool.open(tmp_path, readonly=True) as pool:
    assert_holds(pool, range(60))


def test_closing_ends_the_wait_for_space(tmp_path, monkeypatch, caplog):
  failures = []

  def append():
    try:
      pool.append(sample_groups.make_group(0))
    except errors.PoolError as error:
      failures.append(str(error))

  pool = store.DataPool.open(tmp_path)
  full_disk.Disk(monkeypatch, 0)
  thread = threading.Thread(target=append)
  thread.start()
  while "No space left" not in caplog.text:
    time.sleep(0.01)
  pool.close()
  thread.join()
  assert len(failures) == 1 and "closed" in failures[0]


def test_nothing_is_written_after_a_failed_sync(tmp_path, monkeypatch):
  def fail(descriptor):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  fill(tmp_path, 1)
  pool = store.DataPool.open(tmp_path)
  monkeypatch.setattr(os, "fdatasync", fail)
  with pytest.raises(errors.PoolError, match="Input/output error"):
    pool.append(sample_groups.make_group(1, seed=1))
  monkeypatch.undo()
  with pytest.raises(errors.PoolError, match=r"group 1 .* a sync of"):
    pool.append(sample_groups.make_group(1, seed=1))
  pool.close()
  with store.DataPool.open(tmp_path) as pool:
    assert_holds(pool, range(1))
