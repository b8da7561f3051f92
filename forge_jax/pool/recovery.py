"""What the segments hold: read for a reader, and by a writer after a crash.

An acknowledged record is whole or damaged, and damage is never cut off. What
lies beyond the acknowledged end of the last segment was promised to nobody: its
whole records are taken over, and from the first one that is not whole on it is
a *torn tail*, which the next writer cuts.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import fcntl
import logging
import os
import pathlib

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import records, segment

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Damage:
  """Acknowledged bytes that are not a good record."""

  segment: int
  text: str  # the file, what is damaged, and where


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
  """What a folder of segments holds."""

  rows: list[index_lib.Row]  # of good records, in the order of their places
  sizes: dict[int, int]  # by segment: bytes up to a torn tail, if any
  damage: list[Damage]
  torn: str | None  # the torn tail, in words


def take_lock(folder: pathlib.Path) -> int:
  """Locks an embedded pool for writing; closing the descriptor unlocks it.

  Raises:
    PoolError: another writer holds it.
  """
  path = folder / "lock"
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    os.close(descriptor)
    holder = path.read_text().strip() or "unknown"
    raise errors.PoolError(
      f"{folder}: another writer holds the pool (process {holder}); a pool has "
      "one writer, readers open it with readonly=True"
    ) from error
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
  return descriptor


def recover(folder: pathlib.Path, index: index_lib.SqliteIndex) -> None:
  """Makes the index agree with the segments, and cuts a torn tail.

  Raises:
    PoolError: acknowledged records are damaged or missing; nothing is cut.
  """
  numbers = segment.numbers(folder)
  if index.trusted:
    found = {n: segment.path_of(folder, n).stat().st_size for n in numbers}
    known = index.sizes()
    if all(found.get(n) == known.get(n) for n in found.keys() | known.keys()):
      return
    _LOG.warning("%s: segments differ from what the index says", folder)
  contents = examine(folder, index.sizes())
  if contents.damage:
    lines = "; ".join(damage.text for damage in contents.damage)
    raise errors.PoolError(
      f"{folder}: acknowledged records are damaged: {lines}. "
      f"`python -m forge_jax.pool verify --repair {folder}` keeps what is good"
    )
  if contents.torn:
    _LOG.warning("cut off as a torn tail: %s", contents.torn)
  settle(folder, index, contents)


def settle(
  folder: pathlib.Path, index: index_lib.Index, contents: Contents
) -> None:
  """Makes segments and index what was found in them, durably."""
  for number, size in contents.sizes.items():
    cut(segment.path_of(folder, number), size)
  index.rebuild(contents.rows, contents.sizes)


def cut(path: pathlib.Path, size: int) -> None:
  """Cuts a segment and syncs it: a killed writer may not have."""
  descriptor = os.open(path, os.O_WRONLY)
  try:
    if os.fstat(descriptor).st_size != size:
      os.ftruncate(descriptor, size)
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def examine(
  folder: pathlib.Path,
  acknowledged: Mapping[int, int],
  *,
  bodies: bool = False,
) -> Contents:
  """Reads all segments.

  Args:
    folder: of the pool.
    acknowledged: bytes by segment that are known to be; empty: nothing is, and
      then only what ends the last segment may be torn.
    bodies: whether every record's body is checked; if not, only those beyond
      what was acknowledged are.

  Raises:
    PoolError: a segment is missing, cannot be read, or has another format.
  """
  if not folder.is_dir():
    raise errors.PoolError(f"{folder}: there is no pool in this folder")
  contents = Contents([], {}, [], None)
  numbers = segment.numbers(folder)
  for number in numbers:
    last = number == numbers[-1]
    size = acknowledged.get(number, 0)
    path = segment.path_of(folder, number)
    if bodies or (last and not acknowledged):
      start = 0
    else:
      start = size if acknowledged else path.stat().st_size
    entries = list(segment.scan(path, bodies_from=start))
    if acknowledged:
      end, torn = _torn_beyond(entries, size)
    else:
      end, torn = _torn_at_end(entries if last else [], path.stat().st_size)
    if torn:
      contents = dataclasses.replace(contents, torn=f"{path}: {torn}")
    if end < size:
      missing = (
        f"{size - end} acknowledged bytes from byte {end} on are missing"
      )
      contents.damage.append(Damage(number, f"{path}: {missing}"))
    for entry in entries:
      if entry.place.offset >= end:
        break
      if entry.damage is None:
        contents.rows.append(_row(number, entry))
      else:
        contents.damage.append(Damage(number, f"{path}: {_describe(entry)}"))
    contents.sizes[number] = end
  for number in sorted(acknowledged.keys() - contents.sizes.keys()):
    path = segment.path_of(folder, number)
    contents.damage.append(Damage(number, f"{path} is missing"))
  return contents


def _describe(entry: segment.Entry) -> str:
  """What is damaged, in words."""
  what = "an unknown record"
  if entry.kind >= 0:
    name = records.NAMES.get(entry.kind, f"record of kind {entry.kind}")
    what = f"{name} {entry.key}"
  place = entry.place
  return f"{what}: {entry.damage} at byte {place.offset}, {place.length} bytes"


def _torn_beyond(
  entries: Sequence[segment.Entry], size: int
) -> tuple[int, str | None]:
  """Where the good part ends, and what is torn beyond `size`, if anything."""
  for entry in entries:
    if entry.damage and entry.place.offset >= size:
      return _torn(entries, entry)
  return entries[-1].place.end if entries else 0, None


def _torn_at_end(
  entries: Sequence[segment.Entry], size: int
) -> tuple[int, str | None]:
  """The same where nothing is known to be acknowledged.

  Good records after a bad one say that the bad one had been synced.
  """
  if entries and entries[-1].damage:
    return _torn(entries, entries[-1])
  return size, None


def _torn(
  entries: Sequence[segment.Entry], first: segment.Entry
) -> tuple[int, str]:
  start, end = first.place.offset, entries[-1].place.end
  return start, f"{first.damage} at byte {start}, {end - start} bytes"


def _row(number: int, entry: segment.Entry) -> index_lib.Row:
  return index_lib.Row(
    entry.kind,
    entry.key,
    number,
    entry.place.offset,
    entry.place.length,
    entry.head.decode(),
  )
