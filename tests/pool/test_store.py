"""Nothing acknowledged is lost, nothing damaged goes unnoticed."""

import errno
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import records, segment, store


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
def test_a_damaged_index_is_made_again(tmp_path, clean):
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
    with store.DataPool.open(copy) as pool:
      assert_holds(pool, range(4))


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


def test_unknown_groups_and_closed_pools_are_named(tmp_path):
  fill(tmp_path, 2)
  pool = store.DataPool.open(tmp_path)
  with pytest.raises(errors.PoolError, match="group 5 is not among its 2"):
    pool.get(5)
  pool.close()
  pool.close()
  with pytest.raises(errors.PoolError, match="closed"):
    pool.append(sample_groups.make_group(2))


class Disk:
  """Makes segment writes stop when `room` bytes are left."""

  def __init__(self, monkeypatch, room):
    self.room, self._writev = room, os.writev
    monkeypatch.setattr(os, "writev", self.writev)

  def writev(self, descriptor, buffers):
    if not self.room:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    data = b"".join(buffers)[: self.room]
    self.room -= len(data)
    return self._writev(descriptor, [data])


@pytest.mark.parametrize("segment_bytes", [1, 2**20])
@pytest.mark.parametrize("room", [0, 20, segment.HEADER_BYTES, 500])
def test_a_full_disk_leaves_the_pool_good(
  tmp_path, monkeypatch, segment_bytes, room
):
  fill(tmp_path, 2, segment_bytes)
  config = store.PoolConfig(segment_bytes, full_disk_seconds=0)
  with store.DataPool.open(tmp_path, config) as pool:
    for _ in range(2):
      with monkeypatch.context() as patch:
        Disk(patch, room)
        with pytest.raises(errors.PoolError, match=r"group 2 .*No space left"):
          pool.append(sample_groups.make_group(2, seed=2))
      assert_holds(pool, range(2))
    with store.DataPool.open(tmp_path, readonly=True) as reader:
      assert_holds(reader, range(2))
    pool.append(sample_groups.make_group(2, seed=2))
    assert_holds(pool, range(3))
  with store.DataPool.open(tmp_path) as pool:
    assert_holds(pool, range(3))


def test_an_append_waits_for_space_and_goes_on(tmp_path, monkeypatch, caplog):
  with store.DataPool.open(tmp_path) as pool:
    disk = Disk(monkeypatch, 10)
    thread = threading.Thread(
      target=pool.append, args=(sample_groups.make_group(0, seed=0),)
    )
    thread.start()
    while "No space left" not in caplog.text:
      time.sleep(0.01)
    assert thread.is_alive() and pool.indices() == []
    disk.room = 10**9
    thread.join()
    assert_holds(pool, [0])


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
  Disk(monkeypatch, 0)
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


def test_claims_are_kept_once_and_as_they_were(tmp_path):
  first = records.Claim(1, trained=(0, 2))
  second = records.Claim(2, trained=(3, 1), dropped=(4,), again=(5,))
  with store.DataPool.open(tmp_path) as pool:
    pool.claim(first)
    pool.claim(second)
    pool.claim(first)
    with pytest.raises(errors.PoolError, match="step 2 has another claim"):
      pool.claim(records.Claim(2, trained=(3,)))
  lose_index(tmp_path)
  with store.DataPool.open(tmp_path) as pool:
    assert pool.claims() == [first, second] and pool.claims(2) == [second]
    assert second.consumed == (3, 1, 4, 5)


def test_notes_keep_their_order(tmp_path):
  said = [(3, {"perf": 1.0}), (1, {"by": "é"}), (3, {"perf": 0.0})]
  with store.DataPool.open(tmp_path) as pool:
    for group, record in said:
      pool.annotate(group, record)
    with pytest.raises(errors.PoolError, match="group 4 does not fit"):
      pool.annotate(4, {"bad": object()})
  lose_index(tmp_path)
  with store.DataPool.open(tmp_path, readonly=True) as pool:
    assert [(n.group, n.record) for n in pool.notes()] == said


def test_what_is_known_without_the_tokens(tmp_path):
  group = sample_groups.make_group(7, episodes=3, turns=2)
  with store.DataPool.open(tmp_path) as pool:
    pool.append(group)
    pool.append(sample_groups.make_group(8, episodes=0))
    info, empty = pool.infos()
    assert pool.info(7) == info and pool.infos(8) == [empty]
  assert (info.index, info.task, info.domain) == (7, "sums/train/7", "sums")
  assert (info.episodes, info.completed, info.completions) == (3, 1, 6)
  assert (info.request_tokens, info.response_tokens) == (3 * 10, 3 * 5)
  assert (info.number, info.attempt) == (7, 0)
  assert info.version == group.version
  assert info.perf == pytest.approx(0.3) and empty.perf == 0.0
  assert info.bytes > 0 and empty.version is None


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
