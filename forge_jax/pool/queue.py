"""Where the rollout host and the trainer meet: a window over the store.

Invariants:
  1. A group is visible to the trainer only after it is durable.
  2. Every index is handed out by `admit` until its group is stored; none is
     skipped, none is consumed twice within a surviving history.
  3. A batch is *claimed* by `take`, together with what was dropped on the way
     to it, and the claim is durable before the batch is trained. `commit` says
     that it has been, oldest first, and a checkpoint holds what was committed.
     After a crash, the steps that were lost take what their claims name.
  4. With max_lag 0, the groups of a step are admitted only after the step
     before it has been committed.

The host calls `admit` on an asyncio loop and `complete` on worker threads;
the trainer calls `take` and `commit` on its own thread. Where hosts of other
processes store groups, `adopt` shows them.
"""

import collections
from collections.abc import Callable, Mapping
import threading
import time
from typing import Any

from forge_jax import errors, types
from forge_jax.observe import names
from forge_jax.pool import curation as curation_lib
from forge_jax.pool import draft as draft_lib
from forge_jax.pool import drift as drift_lib
from forge_jax.pool import progress as progress_lib
from forge_jax.pool import records, windowed_fifo
from forge_jax.pool import replay as replay_lib
from forge_jax.pool import store as store_lib
from forge_jax.pool import waiter as waiter_lib
from forge_jax.pool import window as window_lib


class GroupQueue:
  """Groups on their way from the host to the trainer.

  Groups that `store` holds already are completed; a run that continues from a
  checkpoint calls `restore` before anything else. The caller closes the store.
  """

  def __init__(
    self,
    store: store_lib.DataPool,
    config: window_lib.WindowConfig,
    curation: curation_lib.Curation | None = None,
    replay: replay_lib.Replay | None = None,
    drift: drift_lib.DriftConfig | None = None,
  ):
    self._store = store
    self._config = config
    self._curation = curation or curation_lib.Curation()
    self._replay = replay
    self._drift = drift or drift_lib.DriftConfig()
    self._changed = threading.Condition()
    self._waiters: set[waiter_lib.Waiter] = set()
    self._failure: BaseException | None = None
    self.io_tokens = 0  # made durable, each request's own
    self.io_seconds = 0.0  # spent on it by `complete`
    self._trained_steps = 0
    self._begin(progress_lib.Progress())

  async def admit(self) -> progress_lib.Ticket:
    """Waits until a group may be started; says which.

    Raises:
      PoolError: the queue is closed.
      BaseException: what was passed to `fail`.
    """
    while True:
      with self._changed:
        self._require_alive()
        if self._scheduler.admissible(self._trained_steps):
          return self._scheduler.submit(self._trained_steps)
        waiter = waiter_lib.Waiter()
        self._waiters.add(waiter)
      try:
        await waiter.future
      finally:
        with self._changed:
          self._waiters.discard(waiter)

  def release(self, index: int) -> None:
    """Gives back an admitted group that will not be completed here.

    Its index is the next one that `admit` hands out.
    """
    with self._changed:
      self._scheduler.release(index)
      self._notify()

  def complete(self, group: types.Group) -> None:
    """Stores a group, then shows it to the trainer; blocks for the disk.

    A second call for the same index changes nothing.

    Raises:
      PoolError: the store refused it, or its index was never admitted.
    """
    with self._changed:
      self._scheduler.expect(group.index)
    started = time.perf_counter()
    self._store.append(group)
    with self._changed:
      self.io_seconds += time.perf_counter() - started
    self.adopt(group.index)

  def adopt(self, index: int) -> None:
    """Shows the trainer a group that is stored, by whichever process.

    Raises:
      PoolError: it is not stored, or its index was never admitted.
    """
    info = self._store.info(index)
    with self._changed:
      self._scheduler.complete(index)
      self.meter.generate(drift_lib.features(info))
      self.io_tokens += info.request_tokens
      self._notify()

  def take(self, count: int, timeout: float | None = None) -> list[types.Group]:
    """Waits for the batch of one step; returns it in ascending order.

    While it waits it claims every group that may be taken, so that the head
    moves, and groups are admitted, before the batch is full: a window whose
    groups are all consumed but its head would otherwise never fill a batch.

    Args:
      count: number of groups, those that are replayed included.
      timeout: seconds to wait; None: for ever.

    Raises:
      PoolError: the time is up (the next call goes on with what is claimed),
        the queue is closed, a stored group is damaged, or the step's claim of
        before a restart has another number of groups.
      BaseException: what was passed to `fail`.
    """
    end = None if timeout is None else time.monotonic() + timeout
    step = self._next_step
    fresh = count - (self._replay.count if self._replay else 0)
    known = self._known_claims.get(step)
    if known is not None:
      groups = self._take_again(known, fresh, end)
    else:
      groups = self._take_new(step, fresh, end)
    return replay_lib.spread(groups, self._replayed(step))

  def commit(self, step: int) -> None:
    """Notes that the oldest claimed batch has been trained.

    Args:
      step: number of optimizer steps taken, this one included.

    Raises:
      PoolError: it is not the next step, or no batch is claimed.
    """
    with self._changed:
      if step != self._trained_steps + 1 or not self._claims:
        raise errors.PoolError(
          f"step {step} cannot be committed: {self._trained_steps} steps are, "
          f"and {len(self._claims)} batches are claimed"
        )
      claim = self._claims.popleft()
      claim.apply(self._progress)
      self._curated = claim.curated
      self._trained_steps = step
      self._notify()

  def fail(self, error: BaseException) -> None:
    """Makes every waiting and later call raise `error`; the first one wins."""
    with self._changed:
      if self._failure is None:
        self._failure = error
      self._notify()

  def close(self) -> None:
    """Ends all waiting; a second call does nothing."""
    self.fail(errors.PoolError("the group queue is closed"))

  def state(self) -> dict[str, Any]:
    """What a checkpoint needs to keep, as JSON: committed steps and groups."""
    with self._changed:
      return {
        "trained_steps": self._trained_steps,
        **self._progress.state(),
        "curation": self._curated,
      }

  def position(self) -> dict[str, Any]:
    """The state as it will be once all that is claimed is committed."""
    with self._changed:
      progress = progress_lib.Progress.restore(self._progress.state())
      curated = self._curated
      for claim in self._claims:
        claim.apply(progress)
        curated = claim.curated
      return {
        "trained_steps": self._trained_steps + len(self._claims),
        **progress.state(),
        "curation": curated,
      }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues from a checkpoint's state, before any group is admitted.

    Stored groups that the checkpoint has not consumed are completed; what is
    neither consumed nor stored is handed out first, ascending.

    Raises:
      PoolError: the store has no claims of the steps that are trained.
    """
    with self._changed:
      self._trained_steps = state["trained_steps"]
      self._curation.restore(state["curation"])
      self._begin(progress_lib.Progress.restore(state))
      self._notify()

  def curated(self) -> Mapping[str, int]:
    """What was dropped, edited or late so far: counts by metric."""
    return dict(self._curation.counts)

  def stats(self) -> Mapping[str, int]:
    """The window's figures, for people and metrics; all are counts."""
    with self._changed:
      return self._figures()

  def _begin(self, progress: progress_lib.Progress) -> None:
    """Forgets what was not committed, but for the claims of the lost steps."""
    claims = {claim.step: claim for claim in self._store.claims()}
    if claims.keys() and self._trained_steps > max(claims):
      raise errors.PoolError(
        f"{self._trained_steps} steps are trained, and the pool in "
        f"{self._store.path} has claims up to step {max(claims)} only: it is "
        "not the pool of this checkpoint, or has lost records"
      )
    self._known_claims = claims
    self._progress = progress  # what was committed
    self._curated = self._curation.state()  # likewise
    self._claims: collections.deque[draft_lib.Claim] = collections.deque()
    waiting = (
      self._stored_ticket(info)
      for info in self._store.infos(progress.consumed.head)
      if info.index not in progress.consumed
    )
    self._scheduler = windowed_fifo.WindowedFifo(
      self._config, progress, waiting
    )
    # The batch that `take` waits for.
    self._draft = draft_lib.Draft(
      self._curation, self._scheduler, self._changed
    )
    self.meter = drift_lib.DriftMeter(self._drift)
    self.meter.restore(
      self._store.infos(max(0, progress.consumed.head - self._drift.reference)),
      (claims[step] for step in sorted(claims) if step <= self._trained_steps),
    )
    self._fit_window()

  def _note(self, claim: draft_lib.Claim) -> None:
    """Notes a claimed batch; sets the window by the drift, if it shall."""
    self._claims.append(claim)
    infos = [self._store.info(ticket.index) for ticket in claim.trained]
    self.meter.train([drift_lib.features(info) for info in infos])
    self._fit_window()
    self._notify()

  def _fit_window(self) -> None:
    if self._drift.adapt and self._config.policy == "windowed":
      self._scheduler.resize(self.meter.width(self._config.capacity))

  def _stored_ticket(self, info: records.GroupInfo) -> progress_lib.Ticket:
    step = self._trained_steps if info.version is None else info.version
    return progress_lib.Ticket(info.index, info.number, info.attempt, step)

  @property
  def _next_step(self) -> int:
    """The step that the next batch is for."""
    return self._trained_steps + len(self._claims) + 1

  def _take_new(
    self, step: int, fresh: int, end: float | None
  ) -> list[types.Group]:
    """Gathers and claims the batch of step number `step`."""
    draft = self._draft
    draft.call_up(step - 1, fresh)
    while len(draft.kept) < fresh:
      for ticket in self._gather(fresh, end):
        # Read without the lock: host and other readers go on.
        group = self._store.get(ticket.index)
        draft.examine(ticket, group, step - 1, fresh)
      with self._changed:
        self._notify()  # what was dropped makes room
    claim, groups = draft.claim(step - 1)
    self._store.claim(claim.record(step))
    with self._changed:
      self._require_alive()
      self._note(claim)
    return groups

  def _take_again(
    self, known: records.Claim, count: int, end: float | None
  ) -> list[types.Group]:
    """The batch of a step that was claimed before a restart."""
    if len(known.trained) != count:
      raise errors.PoolError(
        f"step {known.step} has claimed {len(known.trained)} groups before; "
        f"{count} are asked for"
      )
    with self._changed:
      scheduler = self._scheduler
      self._wait(lambda: scheduler.holds(known.consumed), count, end)
      trained = [scheduler.consume(index) for index in known.trained]
      dropped = [
        (scheduler.consume(index), again)
        for indices, again in ((known.dropped, False), (known.again, True))
        for index in indices
      ]
      for ticket, again in dropped:
        scheduler.drop(ticket, again)
      step = self._trained_steps + len(self._claims)
      late = [ticket for ticket, again in dropped if again]
      self._draft.count_late(trained, late, step)
      moment = curation_lib.Moment(step, (), count)
    groups = [
      self._curation.edit(self._store.get(index), moment)
      for index in known.trained
    ]
    self._curation.remember(groups)
    with self._changed:
      self._note(draft_lib.Claim(trained, dropped, self._curation.state()))
    return groups

  def _replayed(self, step: int) -> list[types.Group]:
    """Groups of earlier steps for step number `step`."""
    if self._replay is None:
      return []
    moment = curation_lib.Moment(step - 1, (), 0)
    old = [
      self._curation.edit(self._store.get(index), moment)
      for index in self._replay.draw(step)
    ]
    self._curation.counts[names.CURATION_REPLAYED] += len(old)
    return old

  def _wait(
    self, ready: Callable[[], Any], count: int, end: float | None
  ) -> None:
    """Waits with the lock held until something is, or the time is up."""
    left = None if end is None else max(0.0, end - time.monotonic())
    in_time = self._changed.wait_for(lambda: ready() or self._failure, left)
    self._require_alive()
    if not in_time:
      raise errors.PoolError(
        f"no batch of {count} groups in time: "
        + ", ".join(f"{k} {v}" for k, v in self._figures().items())
      )

  def _gather(self, count: int, end: float | None) -> list[progress_lib.Ticket]:
    """Waits for groups towards a batch of `count`, and claims them."""
    with self._changed:
      scheduler = self._scheduler
      self._wait(scheduler.available, count, end)
      step = self._trained_steps + len(self._claims)
      taken, expired = scheduler.take(
        min(count - len(self._draft.kept), scheduler.available()), step
      )
      self._draft.count_late(taken, expired, step)
      self._draft.dropped += [(ticket, True) for ticket in expired]
      self._notify()
      return taken

  def _figures(self) -> dict[str, int]:
    scheduler, counts = self._scheduler, self._curation.counts
    return {
      "trained_steps": self._trained_steps,
      "claimed": sum(len(c.trained) for c in self._claims)
      + len(self._draft.kept),
      "head": scheduler.head,
      "submitted": scheduler.submitted,
      "in_progress": scheduler.in_progress,
      "completed": scheduler.completed,
      "available": scheduler.available(),
      "admissible": scheduler.admissible(self._trained_steps),
      "window": scheduler.width,
      "over_lag": counts[names.QUEUE_OVER_LAG],
      "expired": counts[names.QUEUE_EXPIRED],
    }

  def _require_alive(self) -> None:
    if self._failure is not None:
      raise self._failure

  def _notify(self) -> None:
    """Wakes everyone; called with the lock held."""
    self._changed.notify_all()
    for waiter in self._waiters:
      waiter.wake()
