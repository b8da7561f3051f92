"""Retention drops what no restart asks for; live records survive it."""

import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import compaction, records, segment, store


@pytest.fixture
def pool(tmp_path):
  """Twelve groups, two in a segment; steps 1 to 4 consumed 0 to 8."""
  config = store.PoolConfig(segment_bytes=5000)
  with store.DataPool.open(tmp_path, config) as opened:
    for index in range(12):
      opened.append(sample_groups.make_group(index, seed=index))
    opened.claim(records.Claim(1, trained=(0, 1)))
    opened.claim(records.Claim(2, trained=(3, 4), dropped=(2,)))
    opened.claim(records.Claim(3, trained=(5, 1)))  # 1 is replayed
    opened.claim(records.Claim(4, trained=(7, 8), again=(6,)))
    opened.annotate(0, {"perf": 1.0})
    yield opened


def assert_holds(pool, indices):
  assert pool.indices() == indices
  for index in indices:
    expected = sample_groups.make_group(index, seed=index)
    sample_groups.assert_same(expected, pool.get(index))
  assert [claim.step for claim in pool.claims()] == [1, 2, 3, 4]
  assert [note.group for note in pool.notes()] == [0]


def collect(pool, through, **keep):
  policy = compaction.Retention(**{"keep_steps": 0} | keep)
  return compaction.collect(pool, policy, through)


def size(path):
  return sum(file.stat().st_size for file in path.glob("segment-*"))


@pytest.mark.parametrize(
  "through, keep, left",
  [
    (0, {}, range(12)),
    # 1 is asked for again by step 3.
    (2, {}, [1, 5, 6, 7, 8, 9, 10, 11]),
    (4, {}, [9, 10, 11]),
    (4, {"keep_steps": 2}, [1, 5, 6, 7, 8, 9, 10, 11]),
    (4, {"keep_gb": 1.0}, range(12)),
    (4, {"keep_steps": -1}, range(12)),
  ],
)
def test_the_policy_says_which_groups_stay(pool, tmp_path, through, keep, left):
  before = size(tmp_path)
  done = collect(pool, through, **keep)
  assert_holds(pool, list(left))
  assert done.groups == 12 - len(left)
  assert size(tmp_path) == before - done.bytes
  assert (done.bytes > 0) == (done.groups > 0)
  pool.close()
  with store.DataPool.open(tmp_path) as again:
    assert_holds(again, list(left))
  with store.DataPool.open(tmp_path, readonly=True) as reader:
    assert_holds(reader, list(left))


def test_a_number_of_bytes_is_kept_newest_first(pool):
  infos = pool.infos()
  keep = sum(info.bytes for info in infos[4:])
  collect(pool, 4, keep_gb=keep / 1e9)
  assert_holds(pool, list(range(4, 12)))


def test_the_pool_goes_on_after_it(pool, tmp_path):
  collect(pool, 4)
  pool.append(sample_groups.make_group(12, seed=12))
  assert_holds(pool, [9, 10, 11, 12])
  collect(pool, 4)
  assert_holds(pool, [9, 10, 11, 12])


@pytest.mark.parametrize("calls", range(3))
def test_a_crash_on_the_way_loses_nothing_live(
  pool, tmp_path, monkeypatch, calls
):
  """The process dies at each of the places where a segment is emptied."""

  class Killed(BaseException):
    pass

  empty, done = compaction._empty, []

  def die(*arguments):
    if len(done) == calls:
      raise Killed
    done.append(None)
    empty(*arguments)

  monkeypatch.setattr(compaction, "_empty", die)
  with pytest.raises(Killed):
    collect(pool, 2)
  monkeypatch.undo()
  # What a kill leaves: an index without the mark of a clean close.
  pool.close()
  (tmp_path / "index.clean").unlink()
  with store.DataPool.open(tmp_path) as again:
    assert set(again.indices()) >= {1, 5, 6, 7, 8, 9, 10, 11}
    collect(again, 2)
    assert_holds(again, [1, 5, 6, 7, 8, 9, 10, 11])


def test_a_damaged_live_record_is_not_thrown_away(pool, tmp_path):
  file = segment.path_of(tmp_path, 0)
  data = bytearray(file.read_bytes())
  place = list(segment.scan(file))[1].place  # group 1's
  data[place.end - 9] ^= 1
  file.write_bytes(data)
  with pytest.raises(errors.PoolError, match="checksum mismatch"):
    collect(pool, 2)
  assert file.read_bytes() == data


def test_a_reader_cannot_collect(pool, tmp_path):
  with (
    store.DataPool.open(tmp_path, readonly=True) as reader,
    pytest.raises(errors.PoolError, match="nothing can be collected"),
  ):
    collect(reader, 0)


@pytest.mark.parametrize(
  "field, value", [("keep_gb", -1), ("keep_steps", -2), ("dead_share", 0)]
)
def test_a_policy_that_cannot_be_is_refused(field, value):
  with pytest.raises(errors.ConfigError, match=f"{field} is {value}"):
    compaction.Retention(**{field: value})


def test_a_collector_works_beside_the_pool(pool, tmp_path):
  collector = compaction.Collector(pool, compaction.Retention(keep_steps=0))
  collector.collect(2)
  for index in (12, 13, 14):
    pool.append(sample_groups.make_group(index, seed=index))
  collector.close()
  assert_holds(pool, [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
  collector.collect(4)
  collector.close()
  assert_holds(pool, [9, 10, 11, 12, 13, 14])
  kept = compaction.Collector(pool, compaction.Retention())
  kept.collect(4)
  kept.close()
  assert_holds(pool, [9, 10, 11, 12, 13, 14])


def test_a_collector_that_fails_says_so_and_lets_training_go_on(
  pool, tmp_path, caplog
):
  file = segment.path_of(tmp_path, 0)
  data = bytearray(file.read_bytes())
  data[list(segment.scan(file))[1].place.end - 9] ^= 1  # group 1, which stays
  file.write_bytes(data)
  collector = compaction.Collector(pool, compaction.Retention(keep_steps=0))
  collector.collect(2)
  collector.close()
  assert "retention failed" in caplog.text and "checksum" in caplog.text
  pool.append(sample_groups.make_group(12, seed=12))
