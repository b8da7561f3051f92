"""Windowed FIFO: which items may be submitted, and which may be trained.

Items are groups, by index in submission order. With head h (the oldest item
not consumed), window W, N items in flight and P items an optimizer step:

  1. Only completed items in [h, h + W - 1] may be taken, the lowest first.
  2. The head moves only when the head itself is consumed.
  3. Item i may be submitted only while i - h < N (bound on the position) and
     while i // P - trained steps <= max_lag (bound on the version).

By 1 and 2 an item is overtaken by at most W - 1 later ones; by 3 at most
N + W - 2 others are consumed between its submission and its own consumption,
and the step that trains it comes at most max_lag + ceil((W - 1) / P) steps
after the one whose weights it was begun with. `over_lag` decides what happens
to an item that is taken more than max_lag steps after. Policy "fifo" is W = 1,
"greedy" is W = N. Source: MiniMax, "Forge" (2026), windowed FIFO.

An item that is dropped is consumed: the head moves on. Its task may be
submitted again, as the next new item; an item that trains nothing makes room
for another under the bounds on version and total.

Plain Python, no clock, no threads: `GroupQueue` adds those. A decision costs
O(log N), amortised; one about items to be submitted again, which exist after a
restart only, is linear in their number.
"""

from collections.abc import Iterable
import heapq

from forge_jax import errors
from forge_jax.pool import progress as progress_lib
from forge_jax.pool import window as window_lib


class WindowedFifo:
  """The scheduler: submitted, completed and consumed items, and the rules."""

  def __init__(
    self,
    config: window_lib.WindowConfig,
    progress: progress_lib.Progress | None = None,
    completed: Iterable[progress_lib.Ticket] = (),
  ):
    """A run's beginning, or its continuation.

    Args:
      config: the rules.
      progress: what was consumed and finished before.
      completed: items that are completed and not consumed.

    What is neither consumed nor completed, up to the last item and the last
    task that are known of, is submitted again before anything new.
    """
    progress = progress or progress_lib.Progress()
    self.config = config
    self.width = config.width  # W
    self._capacity = config.capacity  # N
    self._consumed = progress_lib.Frontier(**progress.consumed.state())
    self._spared = progress.dropped
    waiting = {ticket.index: ticket for ticket in completed}
    self._tickets = dict(waiting)  # of what is in progress or completed
    self._completed: set[int] = set()
    self._waiting: list[int] = []  # heap of the completed items
    # The lowest item that is neither consumed nor completed. Taking items one
    # after the other moves the head up to it and no further, so all completed
    # items below `_solid + W` are available.
    self._solid = self._consumed.head
    self._available = 0
    for index in sorted(waiting):
      self._insert(index)
    self._advance()
    last = max([*waiting, *self._consumed.beyond], default=-1)
    self._submitted = max(last + 1, self._consumed.head)
    self._missing = [  # heap of items to be submitted again
      index
      for index in range(self._consumed.head, self._submitted)
      if index not in self._consumed and index not in waiting
    ]
    self._plan_tasks(progress, waiting.values())

  @property
  def head(self) -> int:
    """The oldest item that is not consumed."""
    return self._consumed.head

  @property
  def submitted(self) -> int:
    """The next new index; every lower one was handed out before."""
    return self._submitted

  @property
  def completed(self) -> int:
    """Number of items that are completed and not consumed."""
    return len(self._completed)

  @property
  def in_progress(self) -> int:
    """Number of items that are submitted and not completed."""
    return len(self._tickets) - len(self._completed)

  def admissible(self, step: int) -> int:
    """How many further items may be submitted after `step` trained steps."""
    config = self.config
    limit = self.head + self._capacity
    if config.max_lag is not None:
      ahead = (step + config.max_lag + 1) * config.groups_per_step
      limit = min(limit, ahead + self._spared)
    if config.total is not None:
      limit = min(limit, config.total + self._spared)
    again = sum(index < limit for index in self._missing)
    return again + max(0, limit - self._submitted)

  def submit(self, step: int = 0) -> progress_lib.Ticket:
    """Hands out the lowest item to be submitted again, or a new one.

    Args:
      step: trained steps: the version of the weights it is begun with.

    Raises:
      PoolError: N items are submitted from the head on.
    """
    index = self._missing[0] if self._missing else self._submitted
    if index >= self.head + self._capacity:
      raise errors.PoolError(
        f"group {index} may not be submitted: head {self.head}, "
        f"{self._capacity} groups in flight at most"
      )
    if self._missing:
      heapq.heappop(self._missing)
    else:
      self._submitted += 1
    if self._tasks:
      number, attempt = heapq.heappop(self._tasks)
    else:
      number, attempt = self._next_number, 0
      self._next_number += 1
    ticket = progress_lib.Ticket(index, number, attempt, step)
    self._tickets[index] = ticket
    return ticket

  def release(self, index: int) -> None:
    """Gives back a submitted item: it is submitted again before any other.

    Raises:
      PoolError: the item is not in progress.
    """
    self.expect(index)
    if index in self._completed or index in self._consumed:
      raise errors.PoolError(
        f"group {index} is completed already and cannot be given back"
      )
    ticket = self._tickets.pop(index)
    heapq.heappush(self._missing, index)
    heapq.heappush(self._tasks, (ticket.number, ticket.attempt))

  def complete(self, index: int) -> None:
    """Marks a submitted item as completed; a second time changes nothing.

    Raises:
      PoolError: the item was not submitted, or was given back.
    """
    self.expect(index)
    if index in self._tickets and index not in self._completed:
      self._insert(index)

  def expect(self, index: int) -> None:
    """Raises unless the item is in progress, completed or consumed.

    Raises:
      PoolError: the item was not submitted, or was given back.
    """
    if index not in self._tickets and (
      index < 0 or index not in self._consumed
    ):
      raise errors.PoolError(
        f"group {index} is not in progress; {self._submitted} groups were "
        f"submitted, {len(self._missing)} of them wait for another attempt"
      )

  def available(self) -> int:
    """How many items `take` could hand out now, one after the other."""
    return self._available

  def takeable(self) -> list[int]:
    """The completed items in the window as it lies now, ascending."""
    end = self.head + self.width
    return [i for i in range(self.head, end) if i in self._completed]

  def take(
    self, count: int, step: int = 0
  ) -> tuple[list[progress_lib.Ticket], list[progress_lib.Ticket]]:
    """Consumes items, each the lowest in the window of its moment.

    Args:
      count: items to train.
      step: trained steps when they will be.

    Returns:
      The items to train, fewer than `count` only where others were dropped,
      and those dropped for their lag (now, or before a restart that forgot
      it), whose tasks are submitted again.

    Raises:
      PoolError: fewer are available; nothing is consumed.
    """
    if count > self._available:
      raise errors.PoolError(
        f"{count} groups were asked for, {self._available} are available: "
        f"head {self.head}, window {self.width}"
      )
    taken, expired = [], []
    while len(taken) < count and self._available:
      index = heapq.heappop(self._waiting)
      self._completed.remove(index)
      self._consumed.add(index)
      self._available -= 1
      ticket = self._tickets.pop(index)
      if self._expires(ticket, step):
        self.drop(ticket, again=True)
        expired.append(ticket)
      else:
        taken.append(ticket)
    return taken, expired

  def holds(self, indices: Iterable[int]) -> bool:
    """Whether all of the items are completed and not consumed."""
    return self._completed.issuperset(indices)

  def consume(self, index: int) -> progress_lib.Ticket:
    """Consumes a completed item that was taken before a restart.

    The rules held when it was taken, and are not asked again. Linear in the
    number of completed items.
    """
    self._completed.remove(index)
    self._waiting.remove(index)
    heapq.heapify(self._waiting)
    self._consumed.add(index)
    self._available -= index < self._solid + self.width
    return self._tickets.pop(index)

  def lag(self, ticket: progress_lib.Ticket, step: int) -> int:
    """Steps by which an item trained as `step` + 1 is over max_lag, or 0."""
    bound = self.config.max_lag
    return 0 if bound is None else max(0, step - ticket.step - bound)

  def drop(self, ticket: progress_lib.Ticket, again: bool) -> bool:
    """Notes that a taken item will not be trained.

    Args:
      ticket: the item's.
      again: whether its task shall be submitted again. It is not where a
        later attempt at it is known, or it has had all its attempts.

    Returns:
      Whether a further attempt at the task is made.
    """
    self.spare(1)
    number, attempt = ticket.number, ticket.attempt + 1
    if self._later.get(number, 0) >= attempt:
      return True
    if not again or attempt >= self.config.attempts:
      return False
    heapq.heappush(self._tasks, (number, attempt))
    return True

  def spare(self, count: int) -> None:
    """Makes room for further items: as many consumed ones are not trained.

    A negative count takes the room back.
    """
    self._spared += count

  def resize(self, width: int) -> None:
    """Changes W.

    Raises:
      PoolError: it is not in 1..N.
    """
    if not 1 <= width <= self._capacity:
      raise errors.PoolError(
        f"a window of {width} is not in 1..{self._capacity}"
      )
    old, new = self._solid + self.width, self._solid + width
    self._available += sum(i in self._completed for i in range(old, new))
    self._available -= sum(i in self._completed for i in range(new, old))
    self.width = width

  def _plan_tasks(
    self,
    progress: progress_lib.Progress,
    waiting: Iterable[progress_lib.Ticket],
  ) -> None:
    """Finds the tasks that are to be submitted before new ones."""
    # By task, the last attempt that is completed and waits.
    self._later: dict[int, int] = {}
    for ticket in waiting:
      last = self._later.get(ticket.number, -1)
      self._later[ticket.number] = max(ticket.attempt, last)
    known = [*self._later, *progress.retries, *progress.finished.beyond]
    self._next_number = max([progress.finished.head - 1, *known]) + 1
    self._tasks = [  # heap of (number, attempt)
      (number, progress.retries.get(number, 0))
      for number in range(progress.finished.head, self._next_number)
      if number not in progress.finished
      and self._later.get(number, -1) < progress.retries.get(number, 0)
    ]

  def _expires(self, ticket: progress_lib.Ticket, step: int) -> bool:
    if self._later.get(ticket.number, 0) > ticket.attempt:
      return True  # it was dropped before a restart that forgot it
    return (
      self.config.over_lag == "drop"
      and self.lag(ticket, step) > 0
      and ticket.attempt + 1 < self.config.attempts
    )

  def _insert(self, index: int) -> None:
    self._completed.add(index)
    heapq.heappush(self._waiting, index)
    self._available += index < self._solid + self.width
    self._advance()

  def _advance(self) -> None:
    while self._solid in self._completed or self._solid in self._consumed:
      # The window can now slide one further: over one more item, which counts
      # if it is completed.
      self._available += self._solid + self.width in self._completed
      self._solid += 1
