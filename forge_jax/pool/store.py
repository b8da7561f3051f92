"""The durable store: every completed group, kept in append-only segments.

Invariants:
  1. `append` returns only after the group's bytes are synced to the disk;
     a group whose append returned survives kill -9 and power loss.
  2. A group index is stored at most once; a second append changes nothing.
  3. Bytes that were acknowledged are never written again.
  4. One process writes: the writer holds a lock on the folder's `lock` file.
  5. `_places` names exactly the groups that are durable.

The folder holds `lock` and `segment-00000000.log`, `segment-00000001.log`, ...
A segment is closed, and the next begun, when it has reached its size.
"""

import dataclasses
import fcntl
import itertools
import logging
import os
import pathlib
import threading

from forge_jax import errors, types
from forge_jax.pool import codec, segment

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class PoolConfig:
  """How a pool lays out its files."""

  segment_bytes: int = 128 * 2**20  # a segment that has reached it is closed

  def __post_init__(self):
    if self.segment_bytes < 1:
      raise errors.ConfigError(
        f"segment_bytes is {self.segment_bytes}; expected at least 1"
      )


class DataPool:
  """Groups by index, on disk. Every method may be called from any thread."""

  def __init__(self, path: pathlib.Path, config: PoolConfig, *, readonly: bool):
    self.path = path
    self.readonly = readonly
    self._config = config
    self._mutex = threading.Lock()
    self._places: dict[int, segment.Place] = {}
    self._tail: pathlib.Path | None = None  # the segment appended to
    self._descriptor: int | None = None  # of the tail
    self._size = 0  # of the tail, bytes, all of them acknowledged
    self._lock_descriptor: int | None = None
    self._failure: str | None = None  # why nothing can be appended any more

  @classmethod
  def open(
    cls,
    path: str | os.PathLike,
    config: PoolConfig | None = None,
    *,
    readonly: bool = False,
  ) -> "DataPool":
    """Opens a pool and checks all of it; a writer makes the folder.

    A writer cuts the torn tail that a crash left, with a warning. A reader
    needs no lock, changes nothing, and sees the groups of this instant.

    Raises:
      PoolError: the folder is missing (reader), cannot be used, has another
        writer, or holds damage; the message names the file and the offset.
    """
    pool = cls(pathlib.Path(path), config or PoolConfig(), readonly=readonly)
    try:
      if not readonly:
        pool._make_folder()
        pool._take_lock()
      pool._load()
    except OSError as error:
      pool.close()
      raise errors.PoolError(f"{path}: cannot be opened: {error}") from error
    except errors.PoolError:
      pool.close()
      raise
    return pool

  def append(self, group: types.Group) -> None:
    """Stores a group; when it returns, the group is on the disk.

    Raises:
      PoolError: the disk is full or failed (nothing of the group is kept and
        the pool stays good), the pool is read-only or closed, or the group
        is not well-formed.
    """
    payload = codec.encode(group)
    header, checksum = segment.frame(group.index, payload)
    with self._mutex:
      self._require_writable(group.index)
      if group.index in self._places:
        return
      try:
        self._require_tail()
        segment.write_all(self._descriptor, header)
        segment.write_all(self._descriptor, payload)
      except OSError as error:
        self._undo(group.index, error)
      try:
        os.fsync(self._descriptor)
      except OSError as error:
        # After a failed sync the kernel may have dropped the dirty pages and
        # a later sync would succeed without them, so nothing more is written.
        self._failure = f"a sync of {self._tail} failed: {error}"
        self._undo(group.index, error)
      place = segment.Place(
        self._tail, self._size, group.index, len(payload), checksum
      )
      self._places[group.index] = place
      self._size = place.end

  def get(self, index: int) -> types.Group:
    """Returns a stored group.

    Raises:
      PoolError: the group is not stored, or its bytes have been damaged.
    """
    with self._mutex:
      place = self._places.get(index)
      count = len(self._places)
    if place is None:
      raise errors.PoolError(
        f"{self.path}: group {index} is not among its {count} groups"
      )
    return codec.decode(segment.read(place))

  def indices(self) -> list[int]:
    """The stored groups' indices, ascending."""
    with self._mutex:
      return sorted(self._places)

  def __contains__(self, index: int) -> bool:
    with self._mutex:
      return index in self._places

  def __len__(self) -> int:
    with self._mutex:
      return len(self._places)

  def close(self) -> None:
    """Releases the files and the lock; a second call does nothing."""
    with self._mutex:
      self._failure = "the pool is closed"
      for descriptor in (self._descriptor, self._lock_descriptor):
        if descriptor is not None:
          os.close(descriptor)
      self._descriptor = self._lock_descriptor = None

  def __enter__(self) -> "DataPool":
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def _make_folder(self) -> None:
    missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
    for folder in reversed(missing):
      folder.mkdir(exist_ok=True)
      _sync_folder(folder.parent)

  def _take_lock(self) -> None:
    path = self.path / "lock"
    self._lock_descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      holder = path.read_text().strip() or "unknown"
      raise errors.PoolError(
        f"{self.path}: another writer holds the pool (process {holder}); "
        "a pool has one writer, readers open it with readonly=True"
      ) from error
    os.ftruncate(self._lock_descriptor, 0)
    os.pwrite(self._lock_descriptor, f"{os.getpid()}\n".encode(), 0)

  def _load(self) -> None:
    if not self.path.is_dir():
      raise errors.PoolError(f"{self.path}: there is no pool in this folder")
    paths = sorted(self.path.glob("segment-????????.log"))
    for before, path in itertools.pairwise(paths):
      if _number(path) != _number(before) + 1:
        raise errors.PoolError(
          f"{self.path}: segments are missing between {before.name} and "
          f"{path.name}"
        )
    for path in paths:
      places, tear = segment.scan(path)
      if tear is not None:
        self._handle(tear, is_last=path == paths[-1])
      for place in places:
        self._add(place)
    if paths and not self.readonly:
      self._tail = paths[-1]
      self._descriptor = os.open(self._tail, os.O_WRONLY | os.O_APPEND)
      self._size = os.fstat(self._descriptor).st_size
      # What a killed writer wrote may not have been synced yet.
      os.fsync(self._descriptor)
      _sync_folder(self.path)

  def _handle(self, tear: segment.Tear, is_last: bool) -> None:
    what = (
      f"{tear.path}: {tear.reason} at byte {tear.offset}, {tear.bytes} bytes "
      "from the end"
    )
    if not is_last:
      raise errors.PoolError(f"{what}, with a later segment after it")
    if self.readonly:
      return  # a writer may be in the middle of this very record
    _LOG.warning("%s: cut off as a torn tail", what)
    descriptor = os.open(tear.path, os.O_WRONLY)
    try:
      os.ftruncate(descriptor, tear.offset)
      os.fsync(descriptor)
    finally:
      os.close(descriptor)

  def _add(self, place: segment.Place) -> None:
    other = self._places.setdefault(place.index, place)
    if other is not place:
      raise errors.PoolError(
        f"{place.path}: group {place.index} at byte {place.offset} is stored "
        f"already in {other.path} at byte {other.offset}"
      )

  def _require_writable(self, index: int) -> None:
    reason = "the pool is read-only" if self.readonly else self._failure
    if reason:
      raise errors.PoolError(
        f"{self.path}: group {index} cannot be appended: {reason}"
      )

  def _require_tail(self) -> None:
    """Opens the next segment when there is none or the last one is full."""
    if self._tail is not None and self._size < self._config.segment_bytes:
      return
    number = 0 if self._tail is None else _number(self._tail) + 1
    path = self.path / f"segment-{number:08d}.log"
    # An empty file that a failed attempt left behind is taken over.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
      _sync_folder(self.path)
    except OSError:
      os.close(descriptor)
      raise
    if self._descriptor is not None:
      os.close(self._descriptor)
    self._tail, self._descriptor, self._size = path, descriptor, 0

  def _undo(self, index: int, error: OSError) -> None:
    """Cuts what an append wrote, and raises."""
    if self._descriptor is not None:
      try:
        os.ftruncate(self._descriptor, self._size)
      except OSError as cut:
        self._failure = f"{self._tail} could not be cut after a failure: {cut}"
    raise errors.PoolError(
      f"{self._tail or self.path}: group {index} could not be appended and "
      f"nothing of it is kept: {error.strerror or error}"
    ) from error


def _sync_folder(path: pathlib.Path) -> None:
  """Makes the folder's entries durable."""
  descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _number(path: pathlib.Path) -> int:
  return int(path.stem.removeprefix("segment-"))
