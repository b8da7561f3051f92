"""The index: where each record lies, and how far segments are acknowledged.

Invariants:
  1. A row is visible only when its transaction is durable.
  2. A row and the acknowledged size of its segment change in one transaction.
  3. A (kind, key) has one row; the first one stays until it is moved.

The rows say nothing that the segments do not say, so that the index can be
built again from them. `SqliteIndex` is one process's; `postgres.py` has the one
that several hosts share. Both speak the same SQL.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import errno
import logging
import os
import pathlib
import sqlite3
import threading
from typing import Any, NamedTuple, Protocol
import zlib

from forge_jax import errors
from forge_jax.pool import segment

_LOG = logging.getLogger(__name__)

SCHEMA_VERSION = 1

TABLES = (
  "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT)",
  "CREATE TABLE IF NOT EXISTS segments (segment BIGINT PRIMARY KEY,"
  " size BIGINT NOT NULL)",
  "CREATE TABLE IF NOT EXISTS records (kind BIGINT, key BIGINT,"
  " segment BIGINT NOT NULL, place BIGINT NOT NULL, length BIGINT NOT NULL,"
  " head TEXT NOT NULL, PRIMARY KEY (kind, key))",
)
_COLUMNS = "kind, key, segment, place, length, head"
_INSERT = (
  f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
  " ON CONFLICT (kind, key) DO "
)
_KEEP = _INSERT + "NOTHING"
_MOVE = _INSERT + (
  "UPDATE SET segment = excluded.segment, place = excluded.place,"
  " length = excluded.length"
)
_SIZE = (
  "INSERT INTO segments (segment, size) VALUES (?, ?)"
  " ON CONFLICT (segment) DO UPDATE SET size = excluded.size"
)


class OtherSchemaError(errors.PoolError):
  """The index was written by another version of this package."""


class Row(NamedTuple):
  """A record's row."""

  kind: int
  key: int
  segment: int  # number of the segment
  place: int  # offset, bytes
  length: int  # bytes, header included
  head: str  # JSON


class Database(Protocol):
  """What an index asks of a database; `?` stands for a parameter."""

  def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
    """Runs a statement; returns a cursor with `rowcount` and `fetchall`."""

  def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
    """Runs a statement for every row."""

  def transaction(self) -> contextlib.AbstractContextManager[None]:
    """Commits durably at its end, or changes nothing."""

  def close(self) -> None:
    """Releases the connection."""


class Index:
  """Rows by (kind, key). Every method may be called from any thread."""

  def __init__(self, database: Database):
    """Makes the tables where there are none.

    Raises:
      PoolError: the tables have another schema version, or the database fails.
    """
    self.database = database
    with database.transaction():
      for sql in TABLES:
        database.execute(sql)
      database.execute(
        "INSERT INTO meta (name, value) VALUES ('schema', ?)"
        " ON CONFLICT (name) DO NOTHING",
        (str(SCHEMA_VERSION),),
      )
    (version,) = database.execute(
      "SELECT value FROM meta WHERE name = 'schema'"
    ).fetchall()[0]
    if int(version) != SCHEMA_VERSION:
      raise OtherSchemaError(
        f"the pool's index has schema version {version}; this forge-jax reads "
        f"version {SCHEMA_VERSION}"
      )

  def add(
    self, rows: Sequence[Row], sizes: Mapping[int, int], *, move: bool = False
  ) -> list[Row]:
    """Adds rows in one transaction; durable when it returns.

    Args:
      rows: new ones, or the new places of old ones.
      sizes: acknowledged bytes by segment.
      move: whether a row that exists is moved; else it stays as it is.

    Returns:
      The rows that were not added: they existed already, and stayed.

    Raises:
      OSError: the disk is full; nothing has changed.
      PoolError: the database fails otherwise; what was kept is unknown.
    """
    stayed = []
    with self.database.transaction():
      for row in rows:
        if move:
          self.database.execute(_MOVE, row)
        elif not self.insert(row):
          stayed.append(row)
      self.database.executemany(_SIZE, sizes.items())
    return stayed

  def insert(self, row: Row) -> bool:
    """Adds a row within `add`; False: its key has one already."""
    return bool(self.database.execute(_KEEP, row).rowcount)

  def occupy(self, number: int) -> None:
    """Notes that this process appends to a segment from now on."""

  def vacate(self, number: int) -> None:
    """Notes that it does so no longer."""

  def occupied(self, number: int) -> bool:
    """Whether another process appends to a segment."""
    del number
    return False  # an embedded pool has one writer

  def rebuild(self, rows: Iterable[Row], sizes: Mapping[int, int]) -> None:
    """Replaces everything in one transaction."""
    with self.database.transaction():
      self.database.execute("DELETE FROM records")
      self.database.execute("DELETE FROM segments")
      self.database.executemany(_KEEP, rows)
      self.database.executemany(_SIZE, sizes.items())

  def delete(self, kind: int, keys: Iterable[int]) -> None:
    """Removes rows in one transaction."""
    with self.database.transaction():
      self.database.executemany(
        "DELETE FROM records WHERE kind = ? AND key = ?",
        [(kind, key) for key in keys],
      )

  def find(self, kind: int, key: int) -> Row | None:
    """A record's row; None: there is none."""
    found = self.database.execute(
      f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND key = ?", (kind, key)
    ).fetchall()
    return Row(*found[0]) if found else None

  def rows(self, kind: int, first: int = 0) -> list[Row]:
    """A kind's rows with keys from `first` on, ascending."""
    found = self.database.execute(
      f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND key >= ?"
      " ORDER BY key",
      (kind, first),
    )
    return [Row(*row) for row in found.fetchall()]

  def keys(self, kind: int) -> list[int]:
    """A kind's keys, ascending."""
    found = self.database.execute(
      "SELECT key FROM records WHERE kind = ? ORDER BY key", (kind,)
    )
    return [key for (key,) in found.fetchall()]

  def last(self, kind: int) -> int:
    """A kind's highest key; -1: it has no rows."""
    found = self.database.execute(
      "SELECT MAX(key) FROM records WHERE kind = ?", (kind,)
    )
    (last,) = found.fetchall()[0]
    return -1 if last is None else last

  def count(self, kind: int) -> int:
    """How many rows a kind has."""
    found = self.database.execute(
      "SELECT COUNT(*) FROM records WHERE kind = ?", (kind,)
    )
    return found.fetchall()[0][0]

  def within(self, number: int) -> list[Row]:
    """The rows of a segment, in the order of their places."""
    found = self.database.execute(
      f"SELECT {_COLUMNS} FROM records WHERE segment = ? ORDER BY place",
      (number,),
    )
    return [Row(*row) for row in found.fetchall()]

  def sizes(self) -> dict[int, int]:
    """Acknowledged bytes by segment."""
    found = self.database.execute("SELECT segment, size FROM segments")
    return dict(found.fetchall())

  def close(self) -> None:
    """Closes the database, which is as good as it looks."""
    self.database.close()

  def abandon(self) -> None:
    """Closes the database after a failure."""
    self.database.close()


class Sqlite:
  """A SQLite database: WAL, and every commit synced."""

  def __init__(self, path: pathlib.Path | None):
    """Opens a file, or a database in memory.

    Raises:
      PoolError: it cannot be used, or is not a database.
    """
    self._path = path
    self._lock = threading.RLock()
    self._connection = sqlite3.connect(
      path or ":memory:", check_same_thread=False, isolation_level=None
    )
    with self._errors():
      if path is not None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")

  def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
    """Runs a statement."""
    with self._lock, self._errors():
      return _Found(self._connection.execute(sql, values))

  def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
    """Runs a statement for every row."""
    with self._lock, self._errors():
      self._connection.executemany(sql, rows)

  @contextlib.contextmanager
  def transaction(self) -> Iterator[None]:
    """Commits at its end, or changes nothing."""
    with self._lock:
      try:
        with self._errors():
          self._connection.execute("BEGIN IMMEDIATE")
        yield
        with self._errors():
          self._connection.execute("COMMIT")
      finally:
        if self._connection.in_transaction:
          self._connection.rollback()

  def close(self) -> None:
    """Moves what is in the write-ahead log into the file."""
    with self._lock:
      self._connection.close()

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except sqlite3.Error as error:
      if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
      raise errors.PoolError(
        f"{self._path or 'the index in memory'}: {error}"
      ) from error


class _Found:
  """A statement's result, read while the connection was locked."""

  def __init__(self, cursor: sqlite3.Cursor):
    self.rowcount = cursor.rowcount
    self._rows = cursor.fetchall()

  def fetchall(self) -> list[Any]:
    """All rows."""
    return self._rows


def memory_index() -> Index:
  """An index that only this process sees, and that ends with it."""
  return Index(Sqlite(None))


class SqliteIndex(Index):
  """A file in the pool's folder that is known to be good, or made again.

  SQLite keeps no checksums of its pages. So a clean close leaves the whole
  file's checksum in `index.clean`, which the next writer removes; without one
  that agrees, the index is not `trusted` and is made again from the segments.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens the index; a file that is not trusted is made anew.

    All that is taken over from it are `known_sizes`: what was acknowledged.

    Raises:
      PoolError: it was written by another version, or cannot be made.
    """
    self._path = folder / "index.sqlite"
    self._clean = folder / "index.clean"
    self.trusted = self._is_clean()
    self.known_sizes = {} if self.trusted else self._salvage()
    self._clean.unlink(missing_ok=True)
    segment.sync_folder(folder)
    super().__init__(Sqlite(self._path))
    if self.known_sizes:
      self.rebuild((), self.known_sizes)  # so that they are not lost meanwhile

  def close(self) -> None:
    """Closes the file and says that it is good."""
    super().close()
    if self._others():
      return  # what is in the write-ahead log is not in the file
    with open(self._clean, "wb") as file:
      file.write(_said_of(self._path))
      file.flush()
      os.fsync(file.fileno())
    segment.sync_folder(self._path.parent)

  def _others(self) -> list[pathlib.Path]:
    names = [f"{self._path.name}{end}" for end in ("-wal", "-shm")]
    paths = [self._path.with_name(name) for name in names]
    return [path for path in paths if path.exists()]

  def _is_clean(self) -> bool:
    if not self._clean.exists() or self._others() or not self._path.exists():
      return False
    if self._clean.read_bytes() == _said_of(self._path):
      return True
    _LOG.warning(
      "%s does not agree with %s: the index is made again from the segments",
      self._path,
      self._clean.name,
    )
    return False

  def _salvage(self) -> dict[int, int]:
    """Reads what was acknowledged, if it can be, and removes the files."""
    sizes: dict[int, int] = {}
    if self._path.exists():
      try:
        database = Sqlite(self._path)
        try:
          sizes = Index(database).sizes()
        finally:
          database.close()
      except OtherSchemaError:
        raise  # what another version wrote is not thrown away
      except (errors.PoolError, ValueError):
        pass  # damaged: the segments say it all
    for path in (self._path, *self._others()):
      path.unlink(missing_ok=True)
    return sizes


def _said_of(path: pathlib.Path) -> bytes:
  """A file's checksum, as a line: what `index.clean` holds, to the last byte."""
  checksum = 0
  with path.open("rb") as file:
    while data := file.read(2**20):
      checksum = zlib.crc32(data, checksum)
  return f"{checksum}\n".encode()
