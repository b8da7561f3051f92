"""A pool of several hosts: the index in PostgreSQL, segments on a shared path.

Invariants, beside those of `store.py`:
  1. A host appends to segments of its own, each made exclusively. Nobody
     continues another's segment: what a dead host left beyond the committed
     size was acknowledged to nobody.
  2. A row is visible to other hosts when its transaction is committed, and
     then its bytes are synced. The server must not run with fsync = off.
  3. A segment that a host appends to is locked on the server (an advisory
     lock) until that host ends it or is gone; nobody else empties it.
  4. The folder's file `postgres` says that the index is elsewhere; an embedded
     pool is not opened over it.

The shared path must make synced bytes visible to the other hosts (NFS with
close-to-open consistency does: a reader opens the segment anew). One pool has
one schema of the database.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import threading
from typing import Any

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import log as log_lib
from forge_jax.pool import records, recovery, segment, store, tickets


@dataclasses.dataclass(frozen=True, slots=True)
class SharedConfig:
  """Whether several hosts share a run's pool, and how."""

  # What libpq takes; a password is better in ~/.pgpass. "": embedded.
  database: str = ""
  schema: str = "forge_pool"  # of one run; a plain lower-case name
  lease_seconds: float = 60.0  # after which another host takes a silent one's


class Postgres:
  """A connection to one schema of a PostgreSQL database."""

  def __init__(self, conninfo: str, schema: str = "forge_pool"):
    """Connects, and makes the schema and its tables where there are none.

    Args:
      conninfo: what libpq takes: "postgresql://user@host/database".
      schema: of the pool; a plain lower-case name.

    Raises:
      PoolError: psycopg is not installed, the server cannot be reached or is
        not durable, or the schema's name is not plain.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", schema):
      raise errors.PoolError(
        f"schema {schema!r}: expected lower-case letters, digits and _"
      )
    try:
      import psycopg  # only where several hosts share a pool
    except ImportError as error:
      raise errors.PoolError(
        "a pool in PostgreSQL needs psycopg: pip install 'forge-jax[pool]'"
      ) from error
    self.schema = schema
    self._psycopg = psycopg
    self._lock = threading.RLock()
    with self._errors():
      self._connection = psycopg.connect(conninfo, autocommit=True)
      if self.execute("SHOW fsync").fetchall() != [("on",)]:
        self.close()
        raise errors.PoolError(
          "the PostgreSQL server runs with fsync = off: nothing that it "
          "acknowledges is safe"
        )
      self.execute("SET synchronous_commit = on")
      with self.transaction():
        # Two hosts that make the same table at once disturb one another.
        self.execute("SELECT pg_advisory_xact_lock(hashtext(?))", (schema,))
        self.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        self.execute(f"SET search_path = {schema}")
        for sql in (*index_lib.TABLES, tickets.TABLE):
          self.execute(sql)

  def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
    """Runs a statement."""
    with self._lock, self._errors():
      return self._connection.execute(sql.replace("?", "%s"), values)

  def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
    """Runs a statement for every row."""
    with self._lock, self._errors(), self._connection.cursor() as cursor:
      cursor.executemany(sql.replace("?", "%s"), list(rows))

  @contextlib.contextmanager
  def transaction(self) -> Iterator[None]:
    """Commits at its end, or changes nothing."""
    with self._lock, self._errors(), self._connection.transaction():
      yield

  def close(self) -> None:
    """Ends the connection, and with it what was not committed."""
    self._connection.close()

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except self._psycopg.errors.DiskFull as error:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    except self._psycopg.Error as error:
      text = " ".join(str(error).split())  # on one line
      raise errors.PoolError(f"PostgreSQL: {text}") from error


class SharedIndex(index_lib.Index):
  """The index of a pool that several hosts write to."""

  def __init__(self, database: Postgres, *, leased: bool = False):
    """Makes the tables where there are none.

    Args:
      database: of the pool.
      leased: whether a group is added only while its ticket is open.

    Raises:
      PoolError: the tables have another schema version, or the database fails.
    """
    super().__init__(database)
    self._schema = database.schema
    self._tickets = tickets.Tickets(database) if leased else None

  def insert(self, row: index_lib.Row) -> bool:
    if self._tickets is not None and row.kind == records.GROUP:
      return self._tickets.insert(row)
    return super().insert(row)

  def occupy(self, number: int) -> None:
    self._advise("pg_advisory_lock", number)

  def vacate(self, number: int) -> None:
    with contextlib.suppress(errors.PoolError):  # gone with the connection
      self._advise("pg_advisory_unlock", number)

  def occupied(self, number: int) -> bool:
    if not self._advise("pg_try_advisory_lock", number):
      return True
    self._advise("pg_advisory_unlock", number)
    return False

  def _advise(self, function: str, number: int) -> Any:
    sql = f"SELECT {function}(hashtext(?), ?::int)"
    ((done,),) = self.database.execute(sql, (self._schema, number)).fetchall()
    return done


def open_pool(
  path: str | os.PathLike,
  database: Postgres,
  config: store.PoolConfig | None = None,
  *,
  leased: bool = False,
) -> store.DataPool:
  """Opens a pool for writing by any number of hosts; makes it.

  It closes the database. For reading alone, `DataPool.open(path,
  readonly=True)` needs no database.

  Args:
    path: of the folder that the hosts share.
    database: of the pool.
    config: how it is laid out.
    leased: whether a group is stored only while its ticket is open, as for a
      host that rolls out what it has leased (`tickets.py`).

  Raises:
    PoolError: the folder cannot be used, is an embedded pool's, or holds
      segments of which the database knows nothing.
  """
  folder = pathlib.Path(path)
  try:
    store.make_folder(folder)
    if (folder / "index.sqlite").exists():
      raise errors.PoolError(
        f"{folder} is an embedded pool: its index is in SQLite, not in "
        "PostgreSQL"
      )
    marker = folder / store.ELSEWHERE
    if not marker.exists():
      marker.write_text(f"schema {database.schema}\n", encoding="utf-8")
    index = SharedIndex(database, leased=leased)
    numbers = segment.numbers(folder)
    filled = [
      number
      for number in numbers
      if segment.path_of(folder, number).stat().st_size
    ]
  except OSError as error:
    raise errors.PoolError(f"{path}: cannot be opened: {error}") from error
  unknown = sorted(index.sizes().keys() - set(numbers))
  if unknown:
    raise errors.PoolError(
      f"schema {database.schema!r} is of another pool: it knows segment "
      f"{unknown[0]}, which is not in {folder}"
    )
  if filled and not index.sizes():
    raise errors.PoolError(
      f"{folder} holds {len(filled)} segments and the database no index of "
      "them: is it the right database? `postgres.rebuild` makes the index again"
    )
  log = log_lib.Log(folder, index, config or store.PoolConfig())
  return store.DataPool(folder, index, log)


def rebuild(path: str | os.PathLike, database: Postgres) -> recovery.Contents:
  """Makes a lost index again from the segments, while no host writes.

  Raises:
    PoolError: a segment is missing or cannot be read.
  """
  contents = recovery.examine(pathlib.Path(path), {}, bodies=True)
  index_lib.Index(database).rebuild(contents.rows, contents.sizes)
  return contents
