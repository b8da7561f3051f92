"""Segment files: records end to end, each framed so that damage shows.

A record is a header of 44 bytes, a head and a body. Head and body are bytes,
kind and key are numbers, and what they mean is the user's: the head is what is
wanted without reading the body. All integers are little-endian:

  offset  0  magic, "FJSG"           offset 24  body length, uint64
  offset  4  format version, uint32  offset 32  CRC-32 of the head
  offset  8  kind, uint32            offset 36  CRC-32 of the body
  offset 12  head length, uint32     offset 40  CRC-32 of bytes 0 to 39
  offset 16  key, uint64

Invariants:
  1. What `write` returned is durable once `sync` has returned.
  2. Bytes that were synced are never written again; only `cut` removes any.
  3. The header has a checksum of its own, so that a damaged length is not
     taken for a record's end, and a good header names a damaged record.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import os
import pathlib
import struct
from typing import BinaryIO
import zlib

from forge_jax import errors

FORMAT_VERSION = 2

_MAGIC = b"FJSG"
_FIELDS = struct.Struct("<4sIIIQQII")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_READ_BYTES = 16 * 1024  # read at least, to find many small records at once
_MOST_BUFFERS = 512  # of one writev


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """What is appended."""

  kind: int
  key: int
  head: bytes
  body: bytes | memoryview = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
  """Where a record lies, header included; all in bytes."""

  offset: int
  length: int

  @property
  def end(self) -> int:
    """Offset of the next record."""
    return self.offset + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """What `scan` found at a place.

  `damage` says what is wrong, None: nothing. With a damaged header, kind and
  key are -1 and the place reaches to the next good header or the file's end.
  """

  place: Place
  kind: int
  key: int
  head: bytes
  damage: str | None = None


class SegmentWriter:
  """The end of one segment file; used by one thread at a time."""

  def __init__(self, path: pathlib.Path, *, exclusive: bool = False):
    """Opens a segment, or makes one and its folder's entry durable.

    Raises:
      OSError: it cannot be opened, or is `exclusive` and exists.
    """
    self.path = path
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= os.O_EXCL if exclusive else 0
    self._descriptor = os.open(path, flags, 0o644)
    try:
      sync_folder(path.parent)
      self.size = os.fstat(self._descriptor).st_size
    except OSError:
      os.close(self._descriptor)
      raise

  def write(self, records: Iterable[Record]) -> list[Place]:
    """Appends records; they are durable after the next `sync`.

    Raises:
      OSError: the disk is full or fails; `cut` back to the size before.
    """
    places, buffers = [], []
    for record in records:
      header = _header(record)
      length = len(header) + len(record.head) + len(record.body)
      places.append(Place(self.size, length))
      buffers += (header, record.head, record.body)
      self.size += length
    write_all(self._descriptor, buffers)
    return places

  def sync(self) -> None:
    """Returns when everything written is on the disk.

    Raises:
      OSError: it is not, and must not be tried again: the kernel may have
        dropped the pages, and a later sync would succeed without them.
    """
    os.fdatasync(self._descriptor)

  def cut(self, size: int) -> None:
    """Removes what lies beyond `size`, durably."""
    os.ftruncate(self._descriptor, size)
    self.size = size
    os.fsync(self._descriptor)

  def close(self) -> None:
    """Closes the file."""
    os.close(self._descriptor)


def path_of(folder: pathlib.Path, number: int) -> pathlib.Path:
  """The file of a segment."""
  return folder / f"segment-{number:08d}.log"


def numbers(folder: pathlib.Path) -> list[int]:
  """The segments of a folder, ascending from 0.

  Raises:
    PoolError: some are missing in between.
  """
  found = sorted(
    int(path.stem.removeprefix("segment-"))
    for path in folder.glob("segment-????????.log")
  )
  for expected, number in enumerate(found):
    if number != expected:
      raise errors.PoolError(
        f"{path_of(folder, expected)} is missing; there are segments up to "
        f"{found[-1]}"
      )
  return found


def scan(path: pathlib.Path, *, bodies_from: int = 0) -> Iterator[Entry]:
  """Reads a segment's records in order, good ones and damaged ones.

  Args:
    path: of the segment.
    bodies_from: offset from which on bodies are read and checked; headers and
      heads always are.

  Raises:
    PoolError: the file cannot be read, or was written by another version.
  """
  try:
    with path.open("rb", buffering=0) as file:
      yield from _Scanner(path, file, bodies_from).entries()
  except OSError as error:
    raise errors.PoolError(f"{path}: cannot be read: {error}") from error


def read(path: pathlib.Path, place: Place) -> Record:
  """Reads a record and compares all its checksums.

  Raises:
    PoolError: the file cannot be read, or the record is damaged.
  """
  try:
    with path.open("rb", buffering=0) as file:
      data = os.pread(file.fileno(), place.length, place.offset)
  except OSError as error:
    raise errors.PoolError(f"{path}: cannot be read: {error}") from error
  header = _parse(path, data, place.offset)
  if header is None or header.length != place.length:
    raise errors.PoolError(f"{path}: a damaged header at byte {place.offset}")
  head_end = HEADER_BYTES + header.head_length
  view = memoryview(data)
  head, body = view[HEADER_BYTES:head_end], view[head_end:]
  damage = header.damage(head) or header.body_damage(body)
  if damage or len(data) != place.length:
    raise errors.PoolError(
      f"{path}: {damage or 'an incomplete record'} at byte {place.offset}"
    )
  return Record(header.kind, header.key, bytes(head), body)


def write_all(descriptor: int, buffers: Sequence[bytes]) -> None:
  """Writes all of the buffers; os.writev may stop short."""
  views = [memoryview(b).cast("B") for b in buffers if len(b)]
  first = 0
  while first < len(views):
    written = os.writev(descriptor, views[first : first + _MOST_BUFFERS])
    while written:
      taken = min(written, len(views[first]))
      views[first] = views[first][taken:]
      written -= taken
      first += not views[first]


def sync_folder(path: pathlib.Path) -> None:
  """Makes the folder's entries durable."""
  descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
  kind: int
  key: int
  head_length: int
  body_length: int
  head_checksum: int
  body_checksum: int

  @property
  def length(self) -> int:
    return HEADER_BYTES + self.head_length + self.body_length

  def damage(self, head: bytes) -> str | None:
    good = zlib.crc32(head) == self.head_checksum
    return None if good else "a checksum mismatch in the head"

  def body_damage(self, body: bytes) -> str | None:
    good = zlib.crc32(body) == self.body_checksum
    return None if good else "a checksum mismatch in the body"


class _Scanner:
  """Walks through a segment file with few reads."""

  def __init__(self, path: pathlib.Path, file: BinaryIO, bodies_from: int):
    self._path = path
    self._descriptor = file.fileno()
    self._size = os.fstat(self._descriptor).st_size
    self._bodies_from = bodies_from
    self._start, self._data = 0, b""  # what was read last

  def entries(self) -> Iterator[Entry]:
    offset = 0
    while offset < self._size:
      entry = self._entry(offset)
      yield entry
      offset = entry.place.end

  def _entry(self, offset: int) -> Entry:
    header = self._header(offset)
    if header is None:
      end = self._next_header(offset + 1)
      short = self._size - offset < HEADER_BYTES
      damage = "an incomplete header" if short else "a damaged header"
      return Entry(Place(offset, end - offset), -1, -1, b"", damage)
    place = Place(offset, header.length)
    if place.end > self._size:
      # The record after a damaged one begins where a good header is found.
      end = self._next_header(offset + 1)
      place = Place(offset, end - offset)
      damage = "an incomplete record"
      return Entry(place, header.kind, header.key, b"", damage)
    head = self._bytes(offset + HEADER_BYTES, header.head_length)
    damage = header.damage(head)
    if damage is None and offset >= self._bodies_from:
      start = place.end - header.body_length
      damage = header.body_damage(self._bytes(start, header.body_length))
    return Entry(place, header.kind, header.key, head, damage)

  def _header(self, offset: int) -> _Header | None:
    return _parse(self._path, self._bytes(offset, HEADER_BYTES), offset)

  def _next_header(self, offset: int) -> int:
    """Where the next good header is; the file's end if there is none."""
    while offset < self._size:
      data = self._bytes(offset, _READ_BYTES)
      found = data.find(_MAGIC)
      if found < 0:
        offset += max(1, len(data) - len(_MAGIC) + 1)
      elif self._header(offset + found) is not None:
        return offset + found
      else:
        offset += found + 1
    return self._size

  def _bytes(self, offset: int, length: int) -> bytes:
    """Bytes at an offset; fewer at the end of the file."""
    at = offset - self._start
    if not (at >= 0 and at + length <= len(self._data)):
      count = max(length, _READ_BYTES)
      self._data = os.pread(self._descriptor, count, offset)
      self._start, at = offset, 0
    return self._data[at : at + length]


def _header(record: Record) -> bytes:
  fields = _FIELDS.pack(
    _MAGIC,
    FORMAT_VERSION,
    record.kind,
    len(record.head),
    record.key,
    len(record.body),
    zlib.crc32(record.head),
    zlib.crc32(record.body),
  )
  return fields + _CHECKSUM.pack(zlib.crc32(fields))


def _parse(path: pathlib.Path, data: bytes, offset: int) -> _Header | None:
  """The header at the beginning of `data`; None: there is no good one."""
  if len(data) < HEADER_BYTES:
    return None
  fields = data[: _FIELDS.size]
  (checksum,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
  magic, version, kind, head_length, key, *rest = _FIELDS.unpack(fields)
  if magic != _MAGIC or zlib.crc32(fields) != checksum:
    return None
  if version != FORMAT_VERSION:
    raise errors.PoolError(
      f"{path}: the record at byte {offset} has format {version}; this "
      f"forge-jax reads format {FORMAT_VERSION}"
    )
  body_length, head_checksum, body_checksum = rest
  return _Header(
    kind, key, head_length, body_length, head_checksum, body_checksum
  )
