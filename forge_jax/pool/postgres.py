"""A pool of several hosts: the index in PostgreSQL, segments on a shared path.

Invariants, beside those of `store.py`:
  1. A host appends to segments of its own, each made exclusively. Nobody
     continues another's segment: what a dead host left beyond the committed
     size was acknowledged to nobody.
  2. A row is visible to other hosts when its transaction is committed, and
     then its bytes are synced. The server must not run with fsync = off.
  3. A table of tickets hands out items: each is leased by one host at a time,
     by the server's clock (`FOR UPDATE SKIP LOCKED`).

The shared path must make synced bytes visible to the other hosts (NFS with
close-to-open consistency does: a reader opens the segment anew). One pool has
one schema of the database.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import errno
import os
import pathlib
import re
import threading
from typing import Any

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import log as log_lib
from forge_jax.pool import progress, recovery, segment, store

_TICKETS = (
  "CREATE TABLE IF NOT EXISTS tickets (item BIGINT PRIMARY KEY,"
  " number BIGINT NOT NULL, attempt BIGINT NOT NULL, step BIGINT NOT NULL,"
  " host TEXT, until TIMESTAMPTZ)"
)
_LEASE = (
  "UPDATE tickets SET host = ?, until = now() + make_interval(secs => ?)"
  " WHERE item = (SELECT item FROM tickets"
  " WHERE host IS NULL OR until < now()"
  " ORDER BY item LIMIT 1 FOR UPDATE SKIP LOCKED)"
  " RETURNING item, number, attempt, step"
)
_RENEW = (
  "UPDATE tickets SET until = now() + make_interval(secs => ?)"
  " WHERE item = ? AND host = ?"
)
_GIVE_BACK = (
  "UPDATE tickets SET host = NULL, until = NULL WHERE item = ? AND host = ?"
)


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
        for sql in (*index_lib.TABLES, _TICKETS):
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
      raise errors.PoolError(f"PostgreSQL: {error}") from error


class Tickets:
  """Items on offer, and who has leased them. Used from any thread."""

  def __init__(self, database: Postgres):
    self._database = database

  def offer(self, ticket: progress.Ticket) -> None:
    """Puts an item on offer; a second offer changes nothing."""
    self._database.execute(
      "INSERT INTO tickets (item, number, attempt, step) VALUES (?, ?, ?, ?)"
      " ON CONFLICT (item) DO NOTHING",
      ticket,
    )

  def lease(self, host: str, seconds: float) -> progress.Ticket | None:
    """Takes the lowest item that is free or whose lease is over; or None."""
    found = self._database.execute(_LEASE, (host, seconds)).fetchall()
    return progress.Ticket(*found[0]) if found else None

  def renew(self, host: str, item: int, seconds: float) -> bool:
    """Prolongs a lease; False: the host has it no longer."""
    done = self._database.execute(_RENEW, (seconds, item, host))
    return bool(done.rowcount)

  def give_back(self, host: str, item: int) -> None:
    """Puts a leased item on offer again."""
    self._database.execute(_GIVE_BACK, (item, host))

  def open_items(self) -> list[int]:
    """The items on offer or leased, ascending."""
    found = self._database.execute("SELECT item FROM tickets ORDER BY item")
    return [item for (item,) in found.fetchall()]

  def withdraw(self, items: Iterable[int]) -> None:
    """Removes items: they are stored, or nobody asks for them any more."""
    self._database.executemany(
      "DELETE FROM tickets WHERE item = ?", [(item,) for item in items]
    )


def open_pool(
  path: str | os.PathLike,
  database: Postgres,
  config: store.PoolConfig | None = None,
) -> store.DataPool:
  """Opens a pool for writing by any number of hosts; makes it.

  It closes the database. For reading alone, `DataPool.open(path,
  readonly=True)` needs no database.

  Raises:
    PoolError: the folder cannot be used, or holds segments of which the
      database knows nothing.
  """
  folder = pathlib.Path(path)
  try:
    store.make_folder(folder)
    index = index_lib.Index(database)
    filled = [
      number
      for number in segment.numbers(folder)
      if segment.path_of(folder, number).stat().st_size
    ]
  except OSError as error:
    raise errors.PoolError(f"{path}: cannot be opened: {error}") from error
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
