"""Segment files: records end to end, each framed so that damage shows.

A record is a header of 32 bytes and a payload, all integers little-endian:

  offset  0  magic, "FJGR"           offset 16  payload length, uint64
  offset  4  format version, uint32  offset 24  CRC-32 of the payload
  offset  8  group index, uint64     offset 28  CRC-32 of bytes 0 to 27

A record is synced before the next one is written, so that a crash can leave
at most one bad record, the last of its file: its *torn tail*. The header has
a checksum of its own so that a damaged length is not taken for a torn tail.
"""

import dataclasses
import os
import pathlib
import struct
import zlib

from forge_jax import errors

FORMAT_VERSION = 1

_MAGIC = b"FJGR"
_FIELDS = struct.Struct("<4sIQQI")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
  """Where a group's record lies."""

  path: pathlib.Path  # of the segment file
  offset: int  # of the header, bytes
  index: int  # of the group
  length: int  # of the payload, bytes
  checksum: int  # CRC-32 of the payload

  @property
  def end(self) -> int:
    """Offset of the next record, bytes."""
    return self.offset + HEADER_BYTES + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Tear:
  """A torn tail: the bytes from `offset` on are not a whole record."""

  path: pathlib.Path
  offset: int
  bytes: int
  reason: str


def frame(index: int, payload: bytes) -> tuple[bytes, int]:
  """Returns the record's header and the payload's CRC-32."""
  checksum = zlib.crc32(payload)
  fields = _FIELDS.pack(_MAGIC, FORMAT_VERSION, index, len(payload), checksum)
  return fields + _CHECKSUM.pack(zlib.crc32(fields)), checksum


def scan(path: pathlib.Path) -> tuple[list[Place], Tear | None]:
  """Reads a segment and checks every checksum.

  Returns:
    The places of its records in file order, and its torn tail, if any.

  Raises:
    PoolError: the file cannot be read, was written by a newer version, or
      holds damage that is not a torn tail.
  """
  try:
    data = path.read_bytes()
  except OSError as error:
    raise errors.PoolError(f"{path}: cannot be read: {error}") from error
  places: list[Place] = []
  offset = 0
  while offset < len(data):
    place, reason = _record_at(path, data, offset)
    if reason is None:
      places.append(place)
      offset = place.end
      continue
    followed = place is not None and place.end < len(data)
    if followed or _holds_record(path, data, offset + 1):
      raise errors.PoolError(
        f"{path}: {reason} at byte {offset}, with records after it; the "
        f"{len(places)} records before it are good"
      )
    return places, Tear(path, offset, len(data) - offset, reason)
  return places, None


def read(place: Place) -> bytes:
  """Returns a record's payload, its checksum compared again.

  Raises:
    PoolError: the file cannot be read, or its bytes have changed.
  """
  try:
    with place.path.open("rb") as file:
      file.seek(place.offset + HEADER_BYTES)
      payload = file.read(place.length)
  except OSError as error:
    raise errors.PoolError(f"{place.path}: cannot be read: {error}") from error
  if len(payload) != place.length or zlib.crc32(payload) != place.checksum:
    raise errors.PoolError(
      f"{place.path}: the record of group {place.index} at byte "
      f"{place.offset} has changed since the pool was opened"
    )
  return payload


def write_all(descriptor: int, data: bytes) -> None:
  """Writes all of `data`; os.write may stop short."""
  view = memoryview(data)
  while view:
    view = view[os.write(descriptor, view) :]


def _record_at(
  path: pathlib.Path, data: bytes, offset: int
) -> tuple[Place | None, str | None]:
  """Returns the place, if the header is good, and what is wrong, if any."""
  if offset + HEADER_BYTES > len(data):
    return None, "an incomplete header"
  fields = data[offset : offset + _FIELDS.size]
  (checksum,) = _CHECKSUM.unpack_from(data, offset + _FIELDS.size)
  magic, version, index, length, payload_checksum = _FIELDS.unpack(fields)
  if magic != _MAGIC or zlib.crc32(fields) != checksum:
    return None, "a damaged header"
  if version > FORMAT_VERSION:
    raise errors.PoolError(
      f"{path}: the record at byte {offset} has format {version}; this "
      f"forge-jax reads up to format {FORMAT_VERSION}"
    )
  place = Place(path, offset, index, length, payload_checksum)
  if place.end > len(data):
    return place, f"an incomplete record of group {index}"
  payload = memoryview(data)[offset + HEADER_BYTES : place.end]
  if zlib.crc32(payload) != payload_checksum:
    return place, f"a checksum mismatch in group {index}"
  return place, None


def _holds_record(path: pathlib.Path, data: bytes, start: int) -> bool:
  """Whether a good record begins at or after `start`."""
  offset = data.find(_MAGIC, start)
  while offset >= 0:
    _, reason = _record_at(path, data, offset)
    if reason is None:
      return True
    offset = data.find(_MAGIC, offset + 1)
  return False
