"""Reads every byte of an embedded pool; sets damage aside when asked to.

What is lost is named by kind and key. A record whose very header is damaged is
named by the index, if that is good.
"""

import contextlib
import dataclasses
import os
import pathlib

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import log as log_lib
from forge_jax.pool import records, recovery, segment, store


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
  """What a pool holds and what is wrong with it."""

  counts: dict[str, int]  # good records by kind: groups, claims, notes
  bytes: int  # of the segments
  damage: list[str]  # a line each
  lost: list[str]  # records that are not good any more: "group 7"
  torn: str | None  # a torn tail, which the next writer cuts


def verify(path: str | os.PathLike, *, repair: bool = False) -> Report:
  """Compares every checksum of a pool that nobody writes to.

  With `repair`, the good records of a damaged segment are stored again, its
  file becomes `segment-<number>.log.damaged`, and an empty one takes its place.
  What is lost is then no longer stored: a run that continues rolls it out
  again, unless a step of its checkpoint has consumed it.

  Raises:
    PoolError: there is no pool, it has a writer, or a file cannot be used.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise errors.PoolError(f"{folder}: there is no pool in this folder")
  store.require_embedded(folder)
  try:
    with contextlib.ExitStack() as stack:
      stack.callback(os.close, recovery.take_lock(folder))
      index = index_lib.SqliteIndex(folder)
      good = index.trusted and not repair  # if nothing is changed it stays so
      try:
        report = _examine(folder, index, repair)
        good = good or repair or not report.damage
      finally:
        if good:
          index.close()
        else:
          index.abandon()
      return report
  except OSError as error:
    raise errors.PoolError(f"{folder}: cannot be verified: {error}") from error


def _examine(
  folder: pathlib.Path, index: index_lib.SqliteIndex, repair: bool
) -> Report:
  before = {row[:2] for kind in records.NAMES for row in index.rows(kind)}
  absent = _fill_gaps(folder, index) if repair else []
  contents = recovery.examine(folder, index.sizes(), bodies=True)
  good = {row[:2] for row in contents.rows}
  report = Report(
    counts={
      name: sum(row.kind == kind for row in contents.rows)
      for kind, name in ((records.GROUP, "groups"), (records.CLAIM, "claims"))
    },
    bytes=sum(contents.sizes.values()),
    damage=absent + [damage.text for damage in contents.damage],
    lost=[
      f"{records.NAMES[kind]} {key}" for kind, key in sorted(before - good)
    ],
    torn=contents.torn,
  )
  if repair or not contents.damage:
    recovery.settle(folder, index, contents)
  if repair:
    _set_aside(folder, index, contents)
  return report


def _fill_gaps(folder: pathlib.Path, index: index_lib.Index) -> list[str]:
  """Puts empty segments where some are missing; says which."""
  numbers = [
    int(path.stem.removeprefix("segment-"))
    for path in folder.glob("segment-????????.log")
  ]
  absent = []
  for number in range(max([*numbers, *index.sizes()], default=-1) + 1):
    path = segment.path_of(folder, number)
    if not path.exists():
      absent.append(f"{path} is missing")
      segment.SegmentWriter(path, exclusive=True).close()
      index.add([], {number: 0})
  return absent


def _set_aside(
  folder: pathlib.Path,
  index: index_lib.Index,
  contents: recovery.Contents,
) -> None:
  damaged = sorted({damage.segment for damage in contents.damage})
  if not damaged:
    return
  log = log_lib.Log(folder, index, log_lib.LogConfig())
  try:
    for number in damaged:
      path = segment.path_of(folder, number)
      for row in index.within(number):
        place = segment.Place(row.place, row.length)
        log.move([segment.read(path, place)])
      path.rename(path.with_name(f"{path.name}.damaged"))
      segment.SegmentWriter(path, exclusive=True).close()
      index.add([], {number: 0})
  finally:
    log.close()
