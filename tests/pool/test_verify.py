"""Every damaged byte is found, named, and set aside when asked to."""

import random
import shutil

import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import records, segment, store
from forge_jax.pool import verify as verify_lib


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A pool of eight groups in several segments, and two claims."""
  path = tmp_path_factory.mktemp("pools") / "whole"
  with store.DataPool.open(path, store.PoolConfig(segment_bytes=7000)) as pool:
    for index in range(8):
      pool.append(sample_groups.make_group(index, seed=index))
    pool.claim(records.Claim(1, trained=(0, 1)))
    pool.claim(records.Claim(2, trained=(2, 3)))
  return path


@pytest.fixture
def copy(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "copy")


def flip(path, byte, bit=0):
  data = bytearray(path.read_bytes())
  data[byte] ^= 1 << bit
  path.write_bytes(data)


def test_a_good_pool_is_good_and_stays_as_it_is(copy):
  before = {p.name: p.read_bytes() for p in copy.glob("segment-*")}
  for _ in range(2):
    report = verify_lib.verify(copy)
    assert report.counts == {"groups": 8, "claims": 2}
    assert not report.damage and not report.lost and report.torn is None
  assert before == {p.name: p.read_bytes() for p in copy.glob("segment-*")}


@pytest.mark.parametrize("seed", range(30))
def test_damage_anywhere_is_found_named_and_repaired(copy, seed):
  rng = random.Random(seed)
  file = rng.choice([p for p in copy.glob("segment-*") if p.stat().st_size])
  entries = list(segment.scan(file))
  size = file.stat().st_size
  if seed % 3:
    byte = rng.randrange(size)
    flip(file, byte, rng.randrange(8))
    hit = [e for e in entries if e.place.offset <= byte < e.place.end]
  else:
    cut = rng.randrange(size)
    file.write_bytes(file.read_bytes()[:cut])
    hit = [e for e in entries if e.place.end > cut]
  lost = sorted(f"{records.NAMES[e.kind]} {e.key}" for e in hit)
  for repair in (False, True):
    report = verify_lib.verify(copy, repair=repair)
    assert report.damage and str(file) in report.damage[0]
    # Without the index's names, a damaged header leaves "an unknown record".
    assert repair or sorted(report.lost) == lost
  assert (copy / f"{file.name}.damaged").exists()
  assert not verify_lib.verify(copy).damage
  gone = {e.key for e in hit if e.kind == records.GROUP}
  with store.DataPool.open(copy) as pool:
    assert pool.indices() == sorted(set(range(8)) - gone)
    for index in pool.indices():
      expected = sample_groups.make_group(index, seed=index)
      sample_groups.assert_same(expected, pool.get(index))
    for index in gone:  # rolled out again
      pool.append(sample_groups.make_group(index, seed=index))
    assert len(pool) == 8


def test_a_missing_segment_is_named_and_repaired(copy):
  segment.path_of(copy, 1).unlink()
  with pytest.raises(errors.PoolError, match="is missing"):
    verify_lib.verify(copy)
  report = verify_lib.verify(copy, repair=True)
  assert "segment-00000001.log is missing" in report.damage[0] and report.lost
  assert not verify_lib.verify(copy).damage


def test_opening_tells_how_to_repair_and_forgets_nothing(copy):
  """An acknowledged record at the very end is not taken for a torn tail."""
  numbers = segment.numbers(copy)
  file = segment.path_of(copy, numbers[-1])
  file.write_bytes(file.read_bytes()[:-3])
  for _ in range(3):
    with pytest.raises(errors.PoolError, match="verify --repair"):
      store.DataPool.open(copy)
  verify_lib.verify(copy, repair=True)
  store.DataPool.open(copy).close()


def test_a_pool_with_a_writer_is_left_alone(copy, tmp_path):
  with (
    store.DataPool.open(copy),
    pytest.raises(errors.PoolError, match="another writer"),
  ):
    verify_lib.verify(copy)
  with pytest.raises(errors.PoolError, match="no pool"):
    verify_lib.verify(tmp_path / "none")
