"""A pool of several hosts: their segments, a lost or a wrong database."""

import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import compaction, postgres, records, segment, store
from forge_jax.pool import verify as verify_lib


def test_hosts_append_to_segments_of_their_own(connect, tmp_path):
  with (
    postgres.open_pool(tmp_path, connect()) as one,
    postgres.open_pool(tmp_path, connect()) as other,
  ):
    for index, pool in enumerate([one, other, one, other]):
      pool.append(sample_groups.make_group(index, seed=index))
    other.append(sample_groups.make_group(0, seed=99))  # one has stored it
    assert one.indices() == other.indices() == [0, 1, 2, 3]
    for pool in (one, other):
      for index in range(4):
        expected = sample_groups.make_group(index, seed=index)
        sample_groups.assert_same(expected, pool.get(index))
  assert segment.numbers(tmp_path) == [0, 1]


def test_a_lost_index_is_made_again(connect, tmp_path):
  with postgres.open_pool(tmp_path, connect()) as pool:
    for index in range(3):
      pool.append(sample_groups.make_group(index, seed=index))
  database = connect()
  for table in ("records", "segments"):
    database.execute(f"DELETE FROM {table}")
  with pytest.raises(errors.PoolError, match="is it the right database"):
    postgres.open_pool(tmp_path, database)
  assert len(postgres.rebuild(tmp_path, database).rows) == 3
  with postgres.open_pool(tmp_path, database) as pool:
    assert pool.indices() == [0, 1, 2]


def test_a_lost_connection_ends_the_pool_and_nothing_is_lost(connect, tmp_path):
  database = connect()
  pool = postgres.open_pool(tmp_path, database)
  pool.append(sample_groups.make_group(0, seed=0))
  (pid,) = database.execute("SELECT pg_backend_pid()").fetchall()[0]
  connect().execute("SELECT pg_terminate_backend(?)", (pid,))
  for _ in range(2):
    with pytest.raises(errors.PoolError, match="PostgreSQL"):
      pool._append(store.records.claim_record(store.records.Claim(1, ())), "x")
  pool.close()
  with postgres.open_pool(tmp_path, connect()) as again:
    assert again.indices() == [0] and again.claims() == []


def test_what_cannot_be_used_is_named(connect, postgres_server, tmp_path):
  with pytest.raises(errors.PoolError, match="schema 'No good'"):
    postgres.Postgres(postgres_server, "No good")
  with pytest.raises(
    errors.PoolError, match=r"PostgreSQL: [^\n]*refused[^\n]*$"
  ):
    postgres.Postgres("postgresql://forge@127.0.0.1:1/postgres")
  with postgres.open_pool(tmp_path, connect()):
    pass
  connect().execute("UPDATE meta SET value = '9' WHERE name = 'schema'")
  with pytest.raises(errors.PoolError, match="schema version 9"):
    postgres.open_pool(tmp_path, connect())


def test_a_segment_that_another_host_appends_to_is_left_alone(
  connect, tmp_path
):
  retention = compaction.Retention(keep_steps=0)
  with postgres.open_pool(tmp_path, connect()) as trainer:
    host = postgres.open_pool(tmp_path, connect())
    host.append(sample_groups.make_group(0, seed=0))
    trainer.append(sample_groups.make_group(1, seed=1))
    trainer.claim(records.Claim(1, trained=(0,)))
    assert compaction.collect(trainer, retention, 1).segments == 0
    host.append(sample_groups.make_group(2, seed=2))  # goes on undisturbed
    assert trainer.indices() == [1, 2]
    trainer.claim(records.Claim(2, trained=(2,)))
    host.close()
    assert compaction.collect(trainer, retention, 2).segments == 1
    sample_groups.assert_same(
      sample_groups.make_group(1, seed=1), trainer.get(1)
    )
  assert segment.path_of(tmp_path, 0).stat().st_size == 0


def test_pools_and_databases_that_do_not_belong_together(connect, tmp_path):
  shared, embedded = tmp_path / "shared", tmp_path / "embedded"
  with postgres.open_pool(shared, connect()) as pool:
    pool.append(sample_groups.make_group(0, seed=0))
  with pytest.raises(errors.PoolError, match="its index in PostgreSQL"):
    store.DataPool.open(shared)
  with pytest.raises(errors.PoolError, match="its index in PostgreSQL"):
    verify_lib.verify(shared, repair=True)
  with store.DataPool.open(shared, readonly=True) as reader:
    assert reader.indices() == [0]
  store.DataPool.open(embedded).close()
  with pytest.raises(errors.PoolError, match="is an embedded pool"):
    postgres.open_pool(embedded, connect())
  with pytest.raises(errors.PoolError, match="of another pool: it knows seg"):
    postgres.open_pool(tmp_path / "other", connect())
