"""What leaves a pool: groups by a retention policy, dead bytes, damage.

Invariants:
  1. A group is dropped only if a step up to the oldest checkpoint consumed it:
     a restart from that checkpoint, or a later one, does not ask for it.
  2. Claims and notes are kept for good.
  3. A live record is stored again, and the index points to it, before the
     segment it was in is emptied. A crash in between leaves dead bytes.

A segment that has been emptied stays as an empty file, so that a missing one
still shows. Without a clean close, an embedded pool's index is made again from
the segments, and groups that were dropped from a segment that was not emptied
yet are there again; the next run of `collect` drops them again.
"""

from collections.abc import Sequence
import dataclasses
import logging
import threading

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import log as log_lib
from forge_jax.pool import records, recovery, segment, store

_LOG = logging.getLogger(__name__)
_BATCH_BYTES = 64 * 2**20  # of records that are stored again together


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
  """Which consumed groups stay, and when a segment is worth rewriting."""

  # Steps before the oldest checkpoint whose groups stay; -1: all groups stay.
  keep_steps: int = -1
  keep_gb: float = 0.0  # the newest stay while the groups take less, 1e9 bytes
  dead_share: float = 0.3  # of a segment's bytes, from which on it is rewritten

  def __post_init__(self):
    for name, least in (("keep_steps", -1), ("keep_gb", 0)):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          f"retention {name} is {getattr(self, name)}; expected at least "
          f"{least}"
        )
    if not 0 < self.dead_share <= 1:
      raise errors.ConfigError(
        f"retention dead_share is {self.dead_share}; expected 0 < share <= 1"
      )


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
  """What `collect` did."""

  groups: int  # dropped
  segments: int  # emptied
  bytes: int  # freed on the disk, what was stored again taken off


def collect(
  pool: store.DataPool, retention: Retention, through: int
) -> Collected:
  """Drops what the policy does not keep and empties mostly dead segments.

  The pool may be in use meanwhile. The emptiest segments come first: on a full
  disk they make the room in which others are rewritten.

  Args:
    pool: of the groups.
    retention: the policy.
    through: step of the oldest checkpoint from which a run shall continue.

  Raises:
    PoolError: the pool is read-only, or a live record is damaged.
  """
  log = pool.writing("nothing can be collected")
  dropped = _droppable(pool, retention, through)
  pool.index.delete(records.GROUP, dropped)
  before = _total(pool.index)
  emptied = 0
  dead = _mostly_dead(pool.index, retention.dead_share)
  if log.number in dead:
    log.rotate()
  for number in dead:
    # The segment that this call stores records in is the log's own.
    if number != log.number and not pool.index.occupied(number):
      _move(pool, log, pool.index.within(number))
      _empty(pool, number)
      emptied += 1
  return Collected(len(dropped), emptied, before - _total(pool.index))


def _mostly_dead(index: index_lib.Index, share: float) -> list[int]:
  """Segments of which at least a share is dead, the emptiest first."""
  found = []
  for number, size in index.sizes().items():
    live = sum(row.length for row in index.within(number))
    if size and live <= size * (1 - share):
      found.append((live, number))
  return [number for _, number in sorted(found)]


def _droppable(
  pool: store.DataPool, retention: Retention, through: int
) -> list[int]:
  if retention.keep_steps < 0:
    return []
  last = through - retention.keep_steps
  stored = {info.index: info.bytes for info in pool.infos()}
  old = [
    index
    for claim in pool.claims()
    if claim.step <= last
    for index in sorted(claim.consumed)
    if index in stored
  ]
  # An index that a later step asks for again stays for it.
  needed = {
    index for claim in pool.claims(last + 1) for index in claim.consumed
  }
  total = sum(stored.values())
  dropped = []
  for index in dict.fromkeys(old):  # the oldest step's first
    if total <= retention.keep_gb * 1e9:
      break
    if index not in needed:
      dropped.append(index)
      total -= stored[index]
  return dropped


def _total(index: index_lib.Index) -> int:
  return sum(index.sizes().values())


def _move(
  pool: store.DataPool, log: log_lib.Log, rows: Sequence[index_lib.Row]
) -> None:
  """Stores a segment's records again, `_BATCH_BYTES` at a time."""
  batch, size = [], 0
  for row in rows:
    path = segment.path_of(pool.path, row.segment)
    batch.append(segment.read(path, segment.Place(row.place, row.length)))
    size += row.length
    if size >= _BATCH_BYTES:
      log.move(batch)
      batch, size = [], 0
  log.move(batch)


def _empty(pool: store.DataPool, number: int) -> None:
  pool.index.add([], {number: 0})
  recovery.cut(segment.path_of(pool.path, number), 0)


class Collector:
  """Applies a retention policy beside a run, on a thread of its own."""

  def __init__(self, pool: store.DataPool, retention: Retention):
    self._pool, self._retention = pool, retention
    self._thread: threading.Thread | None = None

  def collect(self, through: int) -> None:
    """Begins to collect, unless nothing may go or it is under way already.

    Args:
      through: as of `collect`.
    """
    if self._retention.keep_steps < 0 or (
      self._thread is not None and self._thread.is_alive()
    ):
      return
    self._thread = threading.Thread(
      target=self._run, args=(through,), name="collector"
    )
    self._thread.start()

  def close(self) -> None:
    """Waits for what is under way."""
    if self._thread is not None:
      self._thread.join()

  def _run(self, through: int) -> None:
    try:
      done = collect(self._pool, self._retention, through)
    except errors.PoolError as error:
      # Nothing is lost by it: training goes on, and the next call tries again.
      _LOG.warning("%s: retention failed: %s", self._pool.path, error)
      return
    if done.groups or done.segments:
      _LOG.info(
        "%s: dropped %d groups up to step %d, freed %.1f MB",
        *(self._pool.path, done.groups, through, done.bytes / 1e6),
      )
