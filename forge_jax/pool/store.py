"""The durable store: completed groups, and which step consumed them.

Invariants:
  1. `append`, `claim` and `annotate` return only after their bytes are synced
     to a segment *and* the index has committed them; what has returned
     survives kill -9 and power loss.
  2. A group index and a step are stored at most once. A second append changes
     nothing; a second claim of a step must be the same.
  3. Bytes that were acknowledged are never written again. `gc` moves live
     records before it empties a segment.
  4. An embedded pool has one writer: it holds a lock on the folder's `lock`.
     A pool whose index is in PostgreSQL has any number; each appends to
     segments of its own.
  5. The segments are the truth: the index can be made again from them.

What a scheduler rebuilds its state from, without reading a token:
`indices()` (stored groups), `infos()` (their heads) and `claims()` (by step:
trained, dropped, to be tried again). A checkpoint names only its step: a claim
is committed before its batch is trained, and stays. So after a crash the steps
that were lost take the very same batches again, and nothing is trained twice,
or skipped, within a surviving history.

The folder holds `segment-00000000.log`, ..., and of an embedded pool `lock`,
`index.sqlite` and, after a clean close, `index.clean`. Records that wait while
another is being synced share the next sync (group commit).
"""

from collections.abc import Mapping
import contextlib
import logging
import os
import pathlib
from typing import Any

from forge_jax import errors, types
from forge_jax.pool import codec, records, recovery, segment
from forge_jax.pool import index as index_lib
from forge_jax.pool import log as log_lib

_LOG = logging.getLogger(__name__)

PoolConfig = log_lib.LogConfig
ELSEWHERE = "postgres"  # a file in the folder of a pool with such an index


class DataPool:
  """Groups by index, on disk. Every method may be called from any thread."""

  def __init__(
    self,
    path: pathlib.Path,
    index: index_lib.Index,
    log: log_lib.Log | None,
    lock: int | None = None,
  ):
    """Takes over its parts; `open` is how a pool is opened."""
    self.path = path
    self.index = index
    self._log = log  # None: read-only
    self._lock = lock
    self._closed = False

  @classmethod
  def open(
    cls,
    path: str | os.PathLike,
    config: PoolConfig | None = None,
    *,
    readonly: bool = False,
  ) -> "DataPool":
    """Opens an embedded pool, or any pool for reading; a writer makes it.

    After a crash a writer reads all headers, takes over what is whole and cuts
    the torn tail, with a warning. A reader needs no lock, changes nothing, and
    sees the groups of this instant; it warns of damage and leaves it out.

    Raises:
      PoolError: the folder is missing (reader), cannot be used, has another
        writer, or holds damage; the message names what is damaged.
    """
    folder = pathlib.Path(path)
    try:
      if readonly:
        return cls(folder, _read_all(folder), None)
      make_folder(folder)
      require_embedded(folder)
      with contextlib.ExitStack() as undo:
        lock = recovery.take_lock(folder)
        undo.callback(os.close, lock)
        index = index_lib.SqliteIndex(folder)
        undo.callback(index.close if index.trusted else index.abandon)
        recovery.recover(folder, index)
        tail = max(segment.numbers(folder), default=None)
        log = log_lib.Log(folder, index, config or PoolConfig(), tail=tail)
        undo.pop_all()
      return cls(folder, index, log, lock)
    except OSError as error:
      raise errors.PoolError(f"{path}: cannot be opened: {error}") from error

  @property
  def readonly(self) -> bool:
    """Whether nothing can be appended."""
    return self._log is None

  def append(self, group: types.Group) -> None:
    """Stores a group; when it returns, the group is on the disk.

    On a full disk it waits, with longer and longer pauses, until there is
    space: `full_disk_seconds` at most.

    Raises:
      PoolError: the disk stayed full or failed (nothing of the group is kept
        and the pool stays good), the pool is read-only or closed, or the group
        is not well-formed.
    """
    if group.index not in self:
      self._append(records.group_record(group), f"group {group.index}")

  def get(self, index: int) -> types.Group:
    """Returns a stored group.

    Raises:
      PoolError: the group is not stored, or its bytes have been damaged.
    """
    row = self._row(index)
    path = segment.path_of(self.path, row.segment)
    place = segment.Place(row.place, row.length)
    try:
      record = segment.read(path, place)
    except errors.PoolError as error:
      moved = self.index.find(records.GROUP, index)
      if moved is not None and moved[:4] != row[:4]:
        return self.get(index)  # gc was faster
      raise errors.PoolError(
        f"group {index} is damaged: {error}; `python -m forge_jax.pool verify "
        "--repair` sets it aside"
      ) from error
    if (record.kind, record.key) != (records.GROUP, index):
      raise errors.PoolError(
        f"{path}: the record at byte {row.place} is not that of group {index}"
      )
    return codec.decode(record.body)

  def info(self, index: int) -> records.GroupInfo:
    """What is known of a stored group without its tokens.

    Raises:
      PoolError: the group is not stored.
    """
    row = self._row(index)
    return records.group_info(row.head, row.length)

  def infos(self, first: int = 0) -> list[records.GroupInfo]:
    """The same of all groups with indices from `first` on, ascending."""
    rows = self.index.rows(records.GROUP, first)
    return [records.group_info(row.head, row.length) for row in rows]

  def indices(self) -> list[int]:
    """The stored groups' indices, ascending."""
    return self.index.keys(records.GROUP)

  def __contains__(self, index: int) -> bool:
    return self.index.find(records.GROUP, index) is not None

  def __len__(self) -> int:
    return self.index.count(records.GROUP)

  def claim(self, claim: records.Claim) -> None:
    """Commits what a step consumes, before it is trained.

    Raises:
      PoolError: the step has another claim already, or as for `append`.
    """
    self._append(records.claim_record(claim), f"the claim of step {claim.step}")
    row = self.index.find(records.CLAIM, claim.step)
    if row is None or records.read_claim(row.head) != claim:
      raise errors.PoolError(
        f"{self.path}: step {claim.step} has another claim already"
      )

  def claims(self, first: int = 0) -> list[records.Claim]:
    """The claims of the steps from `first` on, ascending."""
    rows = self.index.rows(records.CLAIM, first)
    return [records.read_claim(row.head) for row in rows]

  def annotate(self, group: int, record: Mapping[str, Any]) -> None:
    """Keeps something said about a group after the fact, such as a new score.

    Args:
      group: its index; it need not be stored yet.
      record: JSON values.

    Raises:
      PoolError: it does not fit into JSON, or as for `append`.
    """
    new = False
    while not new:  # others may take the same number
      number = self.index.last(records.NOTE) + 1
      note = records.Note(number, group, record)
      new = self._append(records.note_record(note), f"a note on group {group}")

  def notes(self, first: int = 0) -> list[records.Note]:
    """What was said about groups, from note `first` on, in its order."""
    rows = self.index.rows(records.NOTE, first)
    return [records.read_note(row.key, row.head) for row in rows]

  def close(self) -> None:
    """Releases the files and the lock; a second call does nothing."""
    if self._closed:
      return
    self._closed = True
    good = self._log is None or self._log.failure is None
    if self._log is not None:
      self._log.close()
    if good:
      self.index.close()
    else:
      self.index.abandon()
    if self._lock is not None:
      os.close(self._lock)

  def __enter__(self) -> "DataPool":
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def _row(self, index: int) -> index_lib.Row:
    row = self.index.find(records.GROUP, index)
    if row is None:
      raise errors.PoolError(
        f"{self.path}: group {index} is not among its {len(self)} groups"
      )
    return row

  def writing(self, otherwise: str) -> log_lib.Log:
    """The log; `otherwise` begins the error where there is none.

    Raises:
      PoolError: the pool is read-only.
    """
    if self._log is None:
      raise errors.PoolError(f"{self.path}: {otherwise}: it is read-only")
    return self._log

  def _append(self, record: segment.Record, name: str) -> bool:
    log = self.writing(f"{name} cannot be appended")
    try:
      return log.append(record)
    except OSError as error:
      raise errors.PoolError(
        f"{self.path}: {name} could not be appended and nothing of it is "
        f"kept: {error.strerror or error}"
      ) from error
    except errors.PoolError as error:
      raise errors.PoolError(
        f"{self.path}: {name} cannot be appended: {error}"
      ) from error


def require_embedded(folder: pathlib.Path) -> None:
  """Raises where a pool's index is in PostgreSQL.

  Raises:
    PoolError: it is.
  """
  if (folder / ELSEWHERE).exists():
    raise errors.PoolError(
      f"{folder} has its index in PostgreSQL: open it with "
      "`postgres.open_pool`, or here with readonly=True"
    )


def make_folder(path: pathlib.Path) -> None:
  missing = [p for p in (path, *path.parents) if not p.exists()]
  for folder in reversed(missing):
    folder.mkdir(exist_ok=True)
    segment.sync_folder(folder.parent)


def _read_all(folder: pathlib.Path) -> index_lib.Index:
  """A reader's index: what is good, with a warning about what is not."""
  contents = recovery.examine(folder, {})
  for damage in contents.damage:
    _LOG.warning("damaged, left out: %s", damage.text)
  index = index_lib.memory_index()
  index.rebuild(contents.rows, contents.sizes)
  return index
