"""The writing end of a pool: records into segments, their places into an index.

Invariants:
  1. `append` returns only after the record is synced and then its row is
     committed. Bytes beyond a segment's committed size belong to nobody.
  2. One thread writes at a time, for all that wait: they share its two syncs
     (group commit).
  3. After a failure whose outcome is unknown nothing more is written.
  4. A full disk is not such a failure: what was written is cut off, and it is
     tried again, with longer and longer pauses.

Records are opaque here: `segment.Record` has a kind and a key.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import errno
import logging
import pathlib
import threading
import time

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import segment

_LOG = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 10.0  # seconds, while the disk is full


@dataclasses.dataclass(frozen=True, slots=True)
class LogConfig:
  """How a pool lays out its files, and how long it waits for space."""

  segment_bytes: int = 128 * 2**20  # a segment that has reached it is closed
  full_disk_seconds: float = 600.0  # an append waits at most for space

  def __post_init__(self):
    if self.segment_bytes < 1:
      raise errors.ConfigError(
        f"segment_bytes is {self.segment_bytes}; expected at least 1"
      )
    if self.full_disk_seconds < 0:
      raise errors.ConfigError(
        f"full_disk_seconds is {self.full_disk_seconds}; expected at least 0"
      )


@dataclasses.dataclass(slots=True, eq=False)
class _Append:
  """A record on its way."""

  record: segment.Record
  move: bool  # the record is stored already and gets a new place
  done: bool = False
  stayed: bool = False  # one with its kind and key was there before
  error: BaseException | None = None


class Log:
  """Appends records. Every method may be called from any thread."""

  def __init__(
    self,
    folder: pathlib.Path,
    index: index_lib.Index,
    config: LogConfig,
    *,
    tail: int | None = None,
  ):
    """A log that begins a new segment, or continues `tail`, its last one."""
    self._folder = folder
    self._index = index
    self._config = config
    self._changed = threading.Condition()
    self._waiting: list[_Append] = []
    self._writing = False
    self._closed = threading.Event()
    self._failure: str | None = None
    self._writer: segment.SegmentWriter | None = None
    self._number = -1 if tail is None else tail
    if tail is not None:
      self._writer = segment.SegmentWriter(segment.path_of(folder, tail))

  @property
  def failure(self) -> str | None:
    """Why nothing can be appended any more; None: it can."""
    return "the pool is closed" if self._closed.is_set() else self._failure

  @property
  def number(self) -> int:
    """The segment appended to; -1: none yet."""
    return self._number

  def append(self, record: segment.Record) -> bool:
    """Appends a record; when it returns, the record is on the disk.

    Returns:
      Whether it was new: False says that a record with its kind and key was
      stored before, and stays.

    Raises:
      OSError: the disk stayed full or failed.
      PoolError: the log is closed or failed before, or the index failed.
    """
    mine = _Append(record, move=False)
    self._append([mine])
    return not mine.stayed

  def move(self, stored: Iterable[segment.Record]) -> None:
    """Appends records that are stored already: these are their new places.

    Raises: as `append`.
    """
    moved = [_Append(record, move=True) for record in stored]
    if moved:
      self._append(moved)

  def rotate(self) -> None:
    """Ends the segment appended to; the next record begins another."""
    self._alone(self._end_segment)

  def close(self) -> None:
    """Ends all waiting and closes the file; a second call does nothing."""
    self._closed.set()
    self._alone(self._end_segment)

  def _append(self, mine: Sequence[_Append]) -> None:
    last = mine[-1]
    with self._changed:
      self._require_good()
      self._waiting += mine
      self._changed.wait_for(lambda: last.done or not self._writing)
      if not last.done:
        self._writing = True
        batch, self._waiting = self._waiting, []
    if not last.done:
      try:
        self._store(batch)
      except BaseException as error:  # every waiting thread gets it
        for each in batch:
          each.error = error
      finally:
        with self._changed:
          for each in batch:
            each.done = True
          self._writing = False
          self._changed.notify_all()
    if last.error is not None:
      raise last.error

  def _alone(self, action: Callable[[], None]) -> None:
    with self._changed:
      self._changed.wait_for(lambda: not self._writing)
      action()

  def _require_good(self) -> None:
    if self.failure:
      raise errors.PoolError(self.failure)

  def _store(self, batch: Sequence[_Append]) -> None:
    """Stores a batch, waiting for space where there is none."""
    end = time.monotonic() + self._config.full_disk_seconds
    pause = _FIRST_PAUSE
    while True:
      self._require_good()
      try:
        return self._try_to_store(batch)
      except OSError as error:
        if error.errno not in _FULL or time.monotonic() + pause > end:
          raise
        _LOG.warning(
          "%s: %s; %d records wait, trying again in %.1f s",
          self._folder,
          error.strerror,
          len(batch),
          pause,
        )
      self._closed.wait(pause)
      pause = min(2 * pause, _LONGEST_PAUSE)

  def _try_to_store(self, batch: Sequence[_Append]) -> None:
    writer = self._require_segment()
    before = writer.size
    try:
      places = writer.write([each.record for each in batch])
    except OSError:
      self._cut(writer, before)
      raise
    try:
      writer.sync()
    except OSError as error:
      # After a failed sync the kernel may have dropped the dirty pages and a
      # later sync would succeed without them, so nothing more is written.
      self._failure = f"a sync of {writer.path} failed: {error}"
      self._cut(writer, before)
      raise
    pairs = list(zip(batch, places, strict=True))
    try:
      self._add([p for p in pairs if not p[0].move], writer.size, move=False)
      self._add([p for p in pairs if p[0].move], writer.size, move=True)
    except OSError:
      self._cut(writer, before)
      raise
    except errors.PoolError as error:
      self._failure = f"the index failed: {error}"
      raise

  def _add(
    self,
    pairs: Sequence[tuple[_Append, segment.Place]],
    size: int,
    *,
    move: bool,
  ) -> None:
    if not pairs:
      return
    rows = [_row(self._number, each.record, place) for each, place in pairs]
    stayed = self._index.add(rows, {self._number: size}, move=move)
    for (each, _), row in zip(pairs, rows, strict=True):
      each.stayed = row in stayed

  def _cut(self, writer: segment.SegmentWriter, size: int) -> None:
    try:
      writer.cut(size)
    except OSError as error:
      self._failure = f"{writer.path} could not be cut after a failure: {error}"

  def _require_segment(self) -> segment.SegmentWriter:
    """Begins the next segment when there is none or the last one is full."""
    if self._writer and self._writer.size >= self._config.segment_bytes:
      self._end_segment()
    while self._writer is None:
      self._number = max(segment.numbers(self._folder), default=-1) + 1
      path = segment.path_of(self._folder, self._number)
      try:
        self._writer = segment.SegmentWriter(path, exclusive=True)
      except FileExistsError:
        continue  # another host was faster
      self._index.occupy(self._number)
    return self._writer

  def _end_segment(self) -> None:
    if self._writer is not None:
      self._writer.close()
      self._writer = None
      self._index.vacate(self._number)


def _row(
  number: int, record: segment.Record, place: segment.Place
) -> index_lib.Row:
  return index_lib.Row(
    record.kind,
    record.key,
    number,
    place.offset,
    place.length,
    record.head.decode(),
  )
