"""What every pool does, with its index in SQLite or in a real PostgreSQL."""

import itertools
import threading
import time

import full_disk
import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import compaction, postgres, records, segment, store

_SCHEMAS = itertools.count()


class Opener:
  """Opens one pool, again and again."""

  def __init__(self, path, server):
    self.path, self._server = path, server
    self._schema = f"pool_{next(_SCHEMAS)}"

  def __call__(self, config=None):
    if self._server is None:
      return store.DataPool.open(self.path, config)
    database = postgres.Postgres(self._server, self._schema)
    return postgres.open_pool(self.path, database, config)

  def reader(self):
    return store.DataPool.open(self.path, readonly=True)

  def size(self):
    return sum(file.stat().st_size for file in self.path.glob("segment-*"))


@pytest.fixture(params=["sqlite", "postgres"])
def opener(request, tmp_path):
  server = None
  if request.param == "postgres":
    server = request.getfixturevalue("postgres_server")
  return Opener(tmp_path / "a" / "pool", server)


def fill(opener, count, segment_bytes=2**20):
  """Stores groups 0..count-1 and returns the segment files."""
  with opener(store.PoolConfig(segment_bytes)) as pool:
    for index in range(count):
      pool.append(sample_groups.make_group(index, seed=index))
  return sorted(opener.path.glob("segment-*.log"))


def assert_holds(pool, indices):
  assert pool.indices() == list(indices)
  for index in indices:
    expected = sample_groups.make_group(index, seed=index)
    sample_groups.assert_same(expected, pool.get(index))


@pytest.mark.parametrize("segment_bytes", [1, 5000, 2**20])
def test_groups_survive_reopening_and_rotation(opener, segment_bytes):
  files = fill(opener, 7, segment_bytes)
  assert (len(files) > 1) == (segment_bytes < 2**20)
  with opener() as pool:
    assert_holds(pool, range(7))
    pool.append(sample_groups.make_group(9, seed=9))
    assert len(pool) == 8 and 9 in pool and 8 not in pool
  with opener.reader() as pool:
    assert_holds(pool, [*range(7), 9])


def test_a_second_append_of_an_index_changes_nothing(opener):
  fill(opener, 1)
  size = opener.size()
  with opener() as pool:
    pool.append(sample_groups.make_group(0, seed=99))
    assert opener.size() == size
    assert_holds(pool, [0])


def test_unknown_groups_and_closed_pools_are_named(opener):
  fill(opener, 2)
  pool = opener()
  with pytest.raises(errors.PoolError, match="group 5 is not among its 2"):
    pool.get(5)
  pool.close()
  pool.close()
  with pytest.raises(errors.PoolError, match="closed"):
    pool.append(sample_groups.make_group(2))


@pytest.mark.parametrize("segment_bytes", [1, 2**20])
@pytest.mark.parametrize("room", [0, 20, segment.HEADER_BYTES, 500])
def test_a_full_disk_leaves_the_pool_good(
  opener, monkeypatch, segment_bytes, room
):
  fill(opener, 2, segment_bytes)
  config = store.PoolConfig(segment_bytes, full_disk_seconds=0)
  with opener(config) as pool:
    for _ in range(2):
      with monkeypatch.context() as patch:
        full_disk.Disk(patch, room)
        with pytest.raises(errors.PoolError, match=r"group 2 .*No space left"):
          pool.append(sample_groups.make_group(2, seed=2))
      assert_holds(pool, range(2))
    with opener.reader() as reader:
      assert_holds(reader, range(2))
    pool.append(sample_groups.make_group(2, seed=2))
    assert_holds(pool, range(3))
  with opener() as pool:
    assert_holds(pool, range(3))


def test_an_append_waits_for_space_and_goes_on(opener, monkeypatch, caplog):
  with opener() as pool:
    disk = full_disk.Disk(monkeypatch, 10)
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


def test_claims_are_kept_once_and_as_they_were(opener):
  first = records.Claim(1, trained=(0, 2))
  second = records.Claim(2, trained=(3, 1), dropped=(4,), again=(5,))
  with opener() as pool:
    pool.claim(first)
    pool.claim(second)
    pool.claim(first)
    with pytest.raises(errors.PoolError, match="step 2 has another claim"):
      pool.claim(records.Claim(2, trained=(3,)))
  with opener() as pool:
    assert pool.claims() == [first, second] and pool.claims(2) == [second]
    assert second.consumed == (3, 1, 4, 5)


def test_notes_keep_their_order(opener):
  said = [(3, {"perf": 1.0}), (1, {"by": "é"}), (3, {"perf": 0.0})]
  with opener() as pool:
    for group, record in said:
      pool.annotate(group, record)
    with pytest.raises(errors.PoolError, match="group 4 does not fit"):
      pool.annotate(4, {"bad": object()})
  with opener.reader() as pool:
    assert [(n.group, n.record) for n in pool.notes()] == said


def test_what_is_known_without_the_tokens(opener):
  group = sample_groups.make_group(7, episodes=3, turns=2)
  with opener() as pool:
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


def test_threads_may_append_and_read_at_once(opener):
  failures = []

  def work(pool, worker):
    try:
      for index in range(worker, 40, 4):
        pool.append(sample_groups.make_group(index, seed=index))
        assert pool.get(index).index == index
    except (AssertionError, errors.PoolError) as failure:
      failures.append(failure)

  with opener(store.PoolConfig(9000)) as pool:
    threads = [
      threading.Thread(target=work, args=(pool, worker)) for worker in range(4)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not failures
    assert_holds(pool, range(40))
  with opener() as pool:
    assert pool.indices() == list(range(40))


def test_what_was_trained_can_be_dropped(opener):
  with opener(store.PoolConfig(5000)) as pool:
    for index in range(6):
      pool.append(sample_groups.make_group(index, seed=index))
    pool.claim(records.Claim(1, trained=(0, 1, 2, 3)))
  size = opener.size()
  with opener() as pool:
    done = compaction.collect(pool, compaction.Retention(keep_steps=0), 1)
    assert done.groups == 4 and done.bytes == size - opener.size() > 0
    assert_holds(pool, [4, 5])
  with opener() as pool:
    assert_holds(pool, [4, 5])
    assert len(pool.claims()) == 1


def test_the_clock_may_jump(opener, monkeypatch):
  """Nothing is ordered by it, and no wait is measured with it."""
  now = [1e9]
  monkeypatch.setattr(time, "time", lambda: now[0])
  with opener() as pool:
    for index, clock in enumerate([5e9, -7.0, 0.0, 2e9]):
      now[0] = clock
      pool.append(sample_groups.make_group(index, seed=index))
      pool.annotate(index, {"at": clock})
  with opener() as pool:
    assert_holds(pool, range(4))
    assert [info.stored for info in pool.infos()] == [5e9, -7.0, 0.0, 2e9]
    assert [note.group for note in pool.notes()] == [0, 1, 2, 3]
