"""What leaves a pool: groups by a retention policy, dead bytes, damage.

Invariants:
  1. A group is dropped only if a step up to `through` consumed it: a restart
     from a checkpoint of that step, or of a later one, does not ask for it.
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

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import log as log_lib
from forge_jax.pool import records, recovery, segment, store

_BATCH_BYTES = 64 * 2**20  # of records that are stored again together


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
  """Which groups stay, and when a segment is worth rewriting."""

  through: int = 0  # groups consumed by steps up to this one may go
  keep_steps: int = 0  # but not those of the last steps before it
  keep_bytes: int = 0  # nor, newest first, while records of groups take less
  dead_share: float = 0.3  # of a segment's bytes, from which on it is rewritten

  def __post_init__(self):
    for name in ("through", "keep_steps", "keep_bytes"):
      if getattr(self, name) < 0:
        raise errors.ConfigError(
          f"retention {name} is {getattr(self, name)}; expected at least 0"
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


def collect(pool: store.DataPool, retention: Retention) -> Collected:
  """Drops what the policy does not keep and empties mostly dead segments.

  Raises:
    PoolError: the pool is read-only, or a live record is damaged.
  """
  log = pool.writing("nothing can be collected")
  dropped = _droppable(pool, retention)
  pool.index.delete(records.GROUP, dropped)
  log.rotate()
  before = _total(pool.index)
  emptied = 0
  for number, size in sorted(pool.index.sizes().items()):
    rows = pool.index.within(number)
    live = sum(row.length for row in rows)
    # The segment that this call stores records in is the log's own.
    if (
      size
      and number != log.number
      and live <= size * (1 - retention.dead_share)
      and not pool.index.occupied(number)
    ):
      _move(pool, log, rows)
      _empty(pool, number)
      emptied += 1
  return Collected(len(dropped), emptied, before - _total(pool.index))


def _droppable(pool: store.DataPool, retention: Retention) -> list[int]:
  last = retention.through - retention.keep_steps
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
    if total <= retention.keep_bytes:
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
