"""The batch that is being gathered, until it is claimed.

Invariant: a taken item is in exactly one of `kept`, `dropped` and what waits.
"""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import logging
from typing import Any

from forge_jax import types
from forge_jax.observe import names
from forge_jax.pool import curation as curation_lib
from forge_jax.pool import progress as progress_lib
from forge_jax.pool import records, windowed_fifo

_LOG = logging.getLogger(__name__)
_MANY = 8  # batches' worth of dropped groups after which a batch warns


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
  """A batch and what was dropped while it was gathered."""

  trained: list[progress_lib.Ticket]
  dropped: list[tuple[progress_lib.Ticket, bool]]  # whether again
  curated: Mapping[str, Any]  # the curation's state after it

  def apply(self, progress: progress_lib.Progress) -> None:
    """Notes in `progress` that the batch is trained."""
    for ticket, again in self.dropped:
      progress.drop(ticket, again)
    for ticket in self.trained:
      progress.train(ticket)

  def record(self, step: int) -> records.Claim:
    """What the store keeps of it."""
    return records.Claim(
      step,
      trained=tuple(ticket.index for ticket in self.trained),
      dropped=tuple(t.index for t, again in self.dropped if not again),
      again=tuple(t.index for t, again in self.dropped if again),
    )


class Draft:
  """Groups on their way from the window into a batch.

  Used by the thread that gathers; `lock` guards the scheduler.
  """

  def __init__(
    self,
    curation: curation_lib.Curation,
    scheduler: windowed_fifo.WindowedFifo,
    lock: contextlib.AbstractContextManager,
  ):
    self.kept: list[tuple[progress_lib.Ticket, types.Group]] = []
    self.dropped: list[tuple[progress_lib.Ticket, bool]] = []
    self._curation = curation
    self._scheduler = scheduler
    self._lock = lock
    # Put off, with the step that they were refused for.
    self._waiting: list[tuple[progress_lib.Ticket, types.Group, int]] = []

  def count_late(
    self,
    trained: Iterable[progress_lib.Ticket],
    again: Iterable[progress_lib.Ticket],
    step: int,
  ) -> None:
    """Counts the taken items that are over `max_lag`.

    Args:
      trained: those that are trained.
      again: those that are dropped, for this or for another reason.
      step: trained steps when the batch is trained.
    """
    scheduler = self._scheduler
    late = lambda tickets: sum(scheduler.lag(t, step) > 0 for t in tickets)
    self._curation.counts[names.QUEUE_OVER_LAG] += late(trained)
    if scheduler.config.over_lag == "drop":
      self._curation.counts[names.QUEUE_EXPIRED] += late(again)

  def call_up(self, step: int, size: int) -> None:
    """Examines what an earlier batch put off, for the last time.

    Args:
      step: trained steps when the batch is trained.
      size: groups of the batch.
    """
    waiting, self._waiting = self._waiting, []
    for ticket, group, since in waiting:
      if since == step or len(self.kept) >= size:
        self._waiting.append((ticket, group, since))
      else:
        self.examine(ticket, group, step, size, last_chance=True)

  def examine(
    self,
    ticket: progress_lib.Ticket,
    group: types.Group,
    step: int,
    size: int,
    last_chance: bool = False,
  ) -> None:
    """Does with a taken group what the curation says."""
    moment = curation_lib.Moment(step, [g for _, g in self.kept], size)
    verdict = self._curation.examine(group, moment, last_chance)
    with self._lock:
      if verdict.group is not None:
        self.kept.append((ticket, verdict.group))
      elif verdict.waits:
        self._scheduler.spare(1)
        self._waiting.append((ticket, group, step))
      else:
        again = self._scheduler.drop(ticket, verdict.again)
        self.dropped.append((ticket, again))
        self._curation.counts[names.CURATION_RESUBMITTED] += again
        if len(self.dropped) == _MANY * size:
          _LOG.warning(
            "step %d: %d groups were dropped for a batch of %d, which has %d; "
            "the counts so far: %s",
            *(step + 1, len(self.dropped), size, len(self.kept)),
            ", ".join(f"{k} {n}" for k, n in self._curation.counts.items()),
          )

  def claim(self, step: int) -> tuple[Claim, list[types.Group]]:
    """The batch that is full, in ascending order; the next one begins.

    What this batch put off is a candidate of the next one: it makes no room
    for others any more.
    """
    with self._lock:
      self._scheduler.spare(-sum(since == step for *_, since in self._waiting))
    batch = sorted(self.kept, key=lambda pair: pair[0])
    claim = Claim(
      [ticket for ticket, _ in batch], self.dropped, self._curation.state()
    )
    self.kept, self.dropped = [], []
    return claim, [group for _, group in batch]
