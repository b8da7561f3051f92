"""The gateway's journal: what it has acknowledged, on the disk before it was.

Records are appended by an asyncio loop and written in batches. While one batch
is being synced, on a thread, the next gathers: requests that run at the same
time share a sync, and the loop never waits for the disk.

Invariants:
  1. When `sync` returns, everything appended before it survives kill -9 and
     power loss.
  2. A batch is one record of a segment (`pool.segment`), numbered, and synced
     before the next one is written. A crash or a failure of the disk leaves at
     most one bad record, the last of a segment: its torn tail, of which nothing
     was acknowledged. Any other damage is an error.
  3. A segment goes when no session that it tells of is left, oldest first.
  4. One process has the folder; it never writes to a segment of an earlier one.
  5. While the disk is full or fails nothing is acknowledged. What a failed
     write or sync has left is not trusted: the kernel may have dropped what a
     later sync would claim to have written. The batch is written again, with
     its number, to a new segment, until the disk takes it. Of a batch that is
     there twice the first is read.

The body of a record is (session, record) pairs end to end, in MessagePack.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
import concurrent.futures
import contextlib
import fcntl
import logging
import os
import pathlib
from typing import Any, Protocol

import msgpack

from forge_jax import errors
from forge_jax.gateway import refusal
from forge_jax.pool import segment

_log = logging.getLogger(__name__)

_BATCH = 1  # the kind of a segment's records
_SEGMENT_BYTES = 64 * 2**20  # a segment that has reached it is closed
# Seconds before a failed write is tried again; doubled up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0

# Values of MessagePack. An empty record ends its session.
Record = Mapping[str, Any]


class Log(Protocol):
  """What the gateway writes to; see `Journal`."""

  def read(self) -> Iterable[tuple[str, Record]]:
    """What earlier processes have left: (session, record), in order."""

  def check(self) -> None:
    """Refuses what could not be kept now.

    Raises:
      Refusal: status 503, and when to try again.
    """

  def append(self, session: str, record: Record) -> None:
    """Adds a record of a session."""

  def forget(self, session: str) -> None:
    """Says that a session's records are no longer needed."""

  async def sync(self) -> None:
    """Waits until all that was appended is kept.

    Raises:
      Refusal: it cannot be kept; status 503.
    """

  async def aclose(self) -> None:
    """Keeps what is pending, and ends."""


class NoJournal:
  """Keeps nothing: for a gateway that lives and dies with its sessions."""

  def read(self) -> Iterable[tuple[str, Record]]:
    """Nothing."""
    return ()

  def check(self) -> None:
    """Does nothing."""

  def append(self, session: str, record: Record) -> None:
    """Does nothing."""

  def forget(self, session: str) -> None:
    """Does nothing."""

  async def sync(self) -> None:
    """Does nothing."""

  async def aclose(self) -> None:
    """Does nothing."""


class Journal:
  """Appends to a folder; lives on one asyncio loop."""

  def __init__(
    self, folder: str | os.PathLike, segment_bytes: int = _SEGMENT_BYTES
  ):
    """Names the folder; `read` takes it."""
    self._folder = pathlib.Path(folder)
    self._segment_bytes = segment_bytes
    self._lock: int | None = None  # what holds the folder
    self._pending: list[tuple[str, bytes]] = []
    self._appended = self._synced = 0  # records
    self._commit: asyncio.Task[None] | None = None
    self._news = asyncio.Event()  # set, and replaced, when a write has ended
    self._failure: str | None = None  # of the write that is being tried again
    self._pause = _FIRST_PAUSE
    self._ending = asyncio.Event()
    self._batches = 0  # written so far, by earlier processes too
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "journal")
    self._number = -1  # of the last segment
    self._writer: segment.SegmentWriter | None = None  # to that segment
    # The sessions not forgotten, and those of them that a segment tells of.
    self._open: set[str] = set()
    self._told: dict[pathlib.Path, set[str]] = {}  # in the order of segments

  def read(self) -> Iterator[tuple[str, Record]]:
    """Takes the folder; gives what earlier processes have left, in order.

    A session that was forgotten comes too, until an empty record ends it. To be
    read to its end before anything is appended. The folder is made if it is
    missing.

    Yields:
      (session, record).

    Raises:
      ConfigError: the folder cannot be used, or another process has it.
      GatewayError: a segment is damaged; the message says where.
    """
    self._lock = _lock(self._folder)
    for path in sorted(self._folder.glob("segment-*.log")):
      self._number = int(path.stem.removeprefix("segment-"))
      told = self._told.setdefault(path, set())
      for number, payload in _batches(path):
        if number <= self._batches:
          continue
        self._batches = number
        unpacker = msgpack.Unpacker(max_buffer_size=0)
        unpacker.feed(payload)
        for session, record in unpacker:
          told.add(session)
          self._note(session, record)
          yield session, record
    self._drop_segments()

  def check(self) -> None:
    """Refuses what could not be kept now.

    Raises:
      Refusal: the disk is full or fails; status 503, and when to try again.
    """
    if self._failure is not None:
      raise refusal.Refusal(
        self._failure,
        status=503,
        code="not_durable",
        retry_after=self._pause,
      )

  def append(self, session: str, record: Record) -> None:
    """Adds a record of a session; `sync` makes it durable.

    Raises:
      Refusal: the record cannot be written: it is nested too deeply.
    """
    try:
      data = msgpack.packb((session, record))
    except ValueError as error:
      raise refusal.Refusal(f"nested too deeply: {error}") from error
    self._note(session, record)
    self._appended += 1
    self._pending.append((session, data))
    self._begin_commit()

  def forget(self, session: str) -> None:
    """Ends a session; segments that tell of no other go."""
    self.append(session, {})
    self._drop_segments()

  async def sync(self) -> None:
    """Waits until everything appended so far is on the disk.

    Raises:
      Refusal: the disk is full or fails; status 503. It is written once the
        disk takes it.
    """
    target = self._appended
    while self._synced < target:
      self.check()
      await self._news.wait()

  async def aclose(self) -> None:
    """Writes what is pending, if the disk takes it; gives the folder back."""
    self._ending.set()
    while self._commit is not None:
      await self._commit
    self._thread.shutdown()
    if self._writer is not None:
      self._writer.close()
    if self._lock is not None:
      os.close(self._lock)
      self._lock = None

  def _note(self, session: str, record: Record) -> None:
    if record:
      self._open.add(session)
    else:
      self._open.discard(session)

  def _drop_segments(self) -> None:
    # From the oldest on: what ends a session must outlive what tells of it.
    for path in list(self._told):
      current = self._writer is not None and path == self._writer.path
      if current or not self._open.isdisjoint(self._told[path]):
        return
      del self._told[path]
      path.unlink(missing_ok=True)

  def _begin_commit(self) -> None:
    """Writes what is pending, unless something is being written already."""
    if self._commit is None and self._pending:
      self._commit = asyncio.create_task(self._write_pending())

  async def _write_pending(self) -> None:
    """Writes a batch, as often as it takes, then the next if there is one."""
    batch, self._pending = self._pending, []
    count, number = self._appended, self._batches + 1
    payload = b"".join(data for _, data in batch)
    try:
      if await self._write_until_kept(number, payload):
        self._batches = number
        told = self._told.setdefault(self._writer.path, set())
        told.update(session for session, _ in batch)
        self._synced = count
    finally:
      self._commit = None
      self._tell()
    if self._failure is None:
      self._begin_commit()

  async def _write_until_kept(self, number: int, payload: bytes) -> bool:
    """Whether a batch was kept; not, if the end has come before."""
    loop = asyncio.get_running_loop()
    self._pause = _FIRST_PAUSE
    while True:
      last = self._ending.is_set()
      try:
        await loop.run_in_executor(self._thread, self._write, number, payload)
        if self._failure is not None:
          _log.warning("the journal in %s is kept again", self._folder)
        self._failure = None
        return True
      except OSError as error:
        if self._failure is None:
          _log.error("the journal in %s failed: %s", self._folder, error)
        self._failure = f"the journal in {self._folder} failed: {error}"
        self._tell()
      if last:
        return False
      with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(self._ending.wait(), self._pause)
      self._pause = min(2 * self._pause, _LONGEST_PAUSE)

  def _tell(self) -> None:
    """Wakes whoever waits for the end of a write."""
    self._news.set()
    self._news = asyncio.Event()

  def _write(self, number: int, payload: bytes) -> None:
    """Appends a batch and syncs it; runs on the journal's thread."""
    try:
      if self._writer is None or self._writer.size >= self._segment_bytes:
        full, self._writer = self._writer, None
        if full is not None:
          full.close()
        self._number += 1
        path = segment.path_of(self._folder, self._number)
        self._writer = segment.SegmentWriter(path, exclusive=True)
      self._writer.write([segment.Record(_BATCH, number, b"", payload)])
      self._writer.sync()
    except OSError:
      self._leave_segment()
      raise

  def _leave_segment(self) -> None:
    """Never writes to the last segment again; removes it if it keeps nothing."""
    path = segment.path_of(self._folder, self._number)
    writer, self._writer = self._writer, None
    with contextlib.suppress(OSError):
      if writer is not None:
        writer.close()
    with contextlib.suppress(OSError):
      if path not in self._told:
        path.unlink()


def _lock(folder: pathlib.Path) -> int:
  """Makes a folder and takes it; returns the descriptor that holds it."""
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
  except OSError as error:
    raise errors.ConfigError(
      f"the journal cannot be kept in {folder}: {error}"
    ) from error
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    os.close(descriptor)
    raise errors.ConfigError(
      f"the journal in {folder} belongs to a gateway that is running"
    ) from error
  return descriptor


def _batches(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """The numbers and batches of a segment; cuts its torn tail."""
  torn: segment.Entry | None = None
  try:
    for entry in segment.scan(path):
      if entry.damage is not None:
        torn = torn or entry
      elif torn is None:
        record = segment.read(path, entry.place)
        yield record.key, record.body
      else:
        raise errors.GatewayError(
          f"{path}: {torn.damage} at byte {torn.place.offset}, with records "
          "after it"
        )
  except errors.PoolError as error:
    raise errors.GatewayError(str(error)) from error
  if torn is not None:
    offset = torn.place.offset
    _log.warning("%s: cut at byte %d: %s", path, offset, torn.damage)
    os.truncate(path, offset)
