"""Arrow and Parquet say what the pool says."""

import dataclasses

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import export, records, store


@pytest.fixture
def pool(tmp_path):
  with store.DataPool.open(tmp_path / "pool") as opened:
    for index in range(3):
      opened.append(sample_groups.make_group(index, seed=index))
    yield opened


def rows(pool, table):
  schema = export.arrow_schema(table)
  return pa.Table.from_batches(export.batches(pool, table), schema).to_pylist()


def test_groups(pool):
  assert rows(pool, "groups") == [
    dataclasses.asdict(info) for info in pool.infos()
  ]
  assert set(export.arrow_schema("groups").names) == {
    f.name for f in dataclasses.fields(records.GroupInfo)
  }


def test_episodes(pool):
  found = rows(pool, "episodes")
  episodes = [e for i in range(3) for e in pool.get(i).episodes]
  assert [row["episode"] for row in found] == [e.id for e in episodes]
  assert dict(found[0]["rewards"]) == {"answer": 0.1 + 0.2, "style": -1 / 3}
  assert found[1]["status"] == "failed" and found[1]["error"]
  assert found[0]["request_tokens"] == sum(
    len(c.prompt_ids) + len(c.response_ids) for c in episodes[0].completions
  )


def test_completions_have_every_token(pool, monkeypatch):
  monkeypatch.setattr(export, "_BATCH_ROWS", 4)
  found = rows(pool, "completions")
  completions = [
    c for i in range(3) for e in pool.get(i).episodes for c in e.completions
  ]
  for row, completion in zip(found, completions, strict=True):
    for name in ("prompt_ids", "response_ids", "logprobs", "versions"):
      array = getattr(completion, name)
      np.testing.assert_array_equal(np.array(row[name], array.dtype), array)
    assert row["stop_reason"] == "length" and row["parent"] == completion.parent


@pytest.mark.parametrize("table", export.TABLES)
def test_a_parquet_file_holds_the_table(pool, tmp_path, table):
  path = tmp_path / "table.parquet"
  assert export.write_parquet(pool, table, path) == len(rows(pool, table))
  assert parquet.read_table(path).to_pylist() == rows(pool, table)
  with pytest.raises(errors.PoolError, match="exists already"):
    export.write_parquet(pool, table, path)


def test_what_cannot_be_exported_is_named(pool, tmp_path):
  with pytest.raises(errors.PoolError, match="no table 'tokens'"):
    export.arrow_schema("tokens")
  with pytest.raises(errors.PoolError, match="cannot be written"):
    export.write_parquet(pool, "groups", tmp_path / "none" / "x.parquet")
