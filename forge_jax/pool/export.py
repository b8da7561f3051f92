"""A pool as Arrow tables and Parquet files: for notebooks and other tools.

Three tables say different amounts: `groups` has a row for each group and reads
no tokens, `episodes` a row for each episode, and `completions` a row for each
completion, tokens, log-probabilities and versions included.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import os
import pathlib
from typing import Any

from forge_jax import errors, types
from forge_jax.pool import records, store

_BATCH_ROWS = 1024  # of a table that are in memory at a time
TABLES = ("groups", "episodes", "completions")


def arrow_schema(table: str) -> Any:
  """The columns of a table, as a `pyarrow.Schema`.

  Raises:
    PoolError: there is no such table, or pyarrow is not installed.
  """
  pa = _pyarrow()
  text, whole, real = pa.string(), pa.int64(), pa.float64()
  columns = {
    "groups": {
      field.name: {str: text, int: whole, float: real}.get(field.type, whole)
      for field in dataclasses.fields(records.GroupInfo)
    },
    "episodes": {
      "group": whole,
      "task": text,
      "domain": text,
      "episode": text,
      "member": whole,
      "status": text,
      "perf": real,
      "rewards": pa.map_(text, real),
      "completions": whole,
      "request_tokens": whole,
      "response_tokens": whole,
      "seconds": real,
      "error": text,
    },
    "completions": {
      "group": whole,
      "episode": text,
      "completion": text,
      "parent": text,
      "fork_reason": text,
      "stop_reason": text,
      "started": real,
      "finished": real,
      "prompt_ids": pa.list_(pa.int32()),
      "response_ids": pa.list_(pa.int32()),
      "logprobs": pa.list_(pa.float32()),
      "versions": pa.list_(pa.int32()),
    },
  }
  if table not in columns:
    raise errors.PoolError(f"no table {table!r}; expected one of {TABLES}")
  return pa.schema(columns[table])


def batches(pool: store.DataPool, table: str) -> Iterator[Any]:
  """A table as `pyarrow.RecordBatch`es, in the order of the groups.

  Raises:
    PoolError: as `arrow_schema`, or a group is damaged.
  """
  schema = arrow_schema(table)
  rows = _ROWS[table](pool)
  while chunk := list(itertools.islice(rows, _BATCH_ROWS)):
    yield _pyarrow().RecordBatch.from_pylist(chunk, schema=schema)


def write_parquet(
  pool: store.DataPool, table: str, path: str | os.PathLike
) -> int:
  """Writes a table as a Parquet file; returns how many rows it has.

  Raises:
    PoolError: as `batches`, or the file exists or cannot be written.
  """
  schema = arrow_schema(table)
  import pyarrow.parquet as parquet  # only where it is asked for

  target = pathlib.Path(path)
  if target.exists():
    raise errors.PoolError(f"{target}: exists already; not overwritten")
  partial = target.with_name(f"{target.name}.partial")
  count = 0
  try:
    with parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
      for batch in batches(pool, table):
        writer.write_batch(batch)
        count += batch.num_rows
    partial.rename(target)
  except OSError as error:
    raise errors.PoolError(
      f"{target}: cannot be written: {error.strerror or error}"
    ) from error
  finally:
    partial.unlink(missing_ok=True)
  return count


def _group_rows(pool: store.DataPool) -> Iterator[dict[str, Any]]:
  for info in pool.infos():
    yield dataclasses.asdict(info)


def _episode_rows(pool: store.DataPool) -> Iterator[dict[str, Any]]:
  for group, episode in _episodes(pool):
    totals: dict[str, float] = {}
    for reward in episode.rewards:
      totals[reward.name] = totals.get(reward.name, 0.0) + reward.value
    prompts = sum(len(c.prompt_ids) for c in episode.completions)
    responses = sum(len(c.response_ids) for c in episode.completions)
    yield {
      "group": group.index,
      "task": group.task.id,
      "domain": group.task.domain,
      "episode": episode.id,
      "member": episode.member,
      "status": episode.status.value,
      "perf": episode.perf,
      "rewards": list(totals.items()),
      "completions": len(episode.completions),
      "request_tokens": prompts + responses,
      "response_tokens": responses,
      "seconds": episode.seconds,
      "error": episode.error,
    }


def _completion_rows(pool: store.DataPool) -> Iterator[dict[str, Any]]:
  for group, episode in _episodes(pool):
    for completion in episode.completions:
      yield {
        "group": group.index,
        "episode": episode.id,
        "completion": completion.id,
        "parent": completion.parent,
        "fork_reason": completion.fork_reason,
        "stop_reason": completion.stop_reason.value,
        "started": completion.started,
        "finished": completion.finished,
        "prompt_ids": completion.prompt_ids,
        "response_ids": completion.response_ids,
        "logprobs": completion.logprobs,
        "versions": completion.versions,
      }


def _episodes(
  pool: store.DataPool,
) -> Iterator[tuple[types.Group, types.Episode]]:
  for index in pool.indices():
    group = pool.get(index)
    for episode in group.episodes:
      yield group, episode


_ROWS: dict[str, Callable[[store.DataPool], Iterator[dict[str, Any]]]] = {
  "groups": _group_rows,
  "episodes": _episode_rows,
  "completions": _completion_rows,
}


def _pyarrow() -> Any:
  try:
    import pyarrow
  except ImportError as error:
    raise errors.PoolError(
      "Arrow and Parquet need pyarrow: pip install 'forge-jax[pool]'"
    ) from error
  return pyarrow
