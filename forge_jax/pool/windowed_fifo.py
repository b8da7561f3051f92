"""Windowed FIFO: which groups may be submitted, and which may be trained.

Items are group indices in submission order. With head h (the oldest item not
consumed), window W, N items in flight and P items an optimizer step:

  1. Only completed items in [h, h + W - 1] may be taken, the lowest first.
  2. The head moves only when the head itself is consumed.
  3. Item i may be submitted only while i - h < N (bound on the position) and
     while i // P - trained steps <= max_lag (bound on the version).

By 1 and 2 an item is overtaken by at most W - 1 later ones; by 3 at most
N + W - 2 others are consumed between its submission and its own consumption,
and the step that trains it comes at most max_lag + ceil((W - 1) / P) steps
after the one whose weights it was begun with. Policy "fifo" is W = 1, "greedy"
is W = N. Source: MiniMax, "Forge" (2026), windowed FIFO.

Plain Python, no clock, no threads: `GroupQueue` adds those. A decision costs
O(log N), amortised; one about items to be submitted again, which exist after a
restart only, is linear in their number.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import heapq
from typing import Any

from forge_jax import errors

POLICIES = ("windowed", "fifo", "greedy")


@dataclasses.dataclass(frozen=True, slots=True)
class WindowConfig:
  """The bounds on order and age; all counts are of groups but `max_lag`."""

  policy: str = "windowed"  # or "fifo" (window 1), "greedy" (window N)
  in_flight: int = 16  # N: most groups submitted from the head on
  window: int = 5  # W: groups from the head on that may be taken
  max_lag: int = 1  # optimizer steps a group may be begun ahead; 0: in step
  groups_per_step: int = 8  # P: groups an optimizer step consumes
  total: int | None = None  # groups of the whole run; None: no end

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise errors.ConfigError(
        f"window policy is {self.policy!r}; expected one of {POLICIES}"
      )
    for name, least in (
      ("in_flight", 1),
      ("window", 1),
      ("max_lag", 0),
      ("groups_per_step", 1),
    ):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          f"window {name} is {getattr(self, name)}; expected at least {least}"
        )

  @property
  def width(self) -> int:
    """W as the policy has it."""
    return {
      "windowed": min(self.window, self.in_flight),
      "fifo": 1,
      "greedy": self.in_flight,
    }[self.policy]


class Frontier:
  """A set of indices that grows almost in order: 0..head-1 and a few more."""

  def __init__(self, head: int = 0, beyond: Iterable[int] = ()):
    self.head = head  # the lowest index that is not in the set
    self.beyond: set[int] = set()
    for index in beyond:
      self.add(index)

  def __contains__(self, index: int) -> bool:
    return index < self.head or index in self.beyond

  def add(self, index: int) -> None:
    """Adds an index; adding one twice changes nothing."""
    if index < self.head:
      return
    self.beyond.add(index)
    while self.head in self.beyond:
      self.beyond.remove(self.head)
      self.head += 1

  def state(self) -> dict[str, Any]:
    """The set as JSON; `Frontier(**state)` is its inverse."""
    return {"head": self.head, "beyond": sorted(self.beyond)}


class WindowedFifo:
  """The scheduler: submitted, completed and consumed items, and the rules."""

  def __init__(self, config: WindowConfig):
    self.config = config
    self._resume(Frontier(), completed=(), submitted=0)

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
    return (
      self._submitted
      - self.head
      - len(self._consumed.beyond)
      - len(self._completed)
      - len(self._missing)
    )

  def admissible(self, trained_steps: int) -> int:
    """How many further items may be submitted now."""
    config = self.config
    by_version = (trained_steps + config.max_lag + 1) * config.groups_per_step
    limit = min(self.head + config.in_flight, by_version)
    if config.total is not None:
      limit = min(limit, config.total)
    again = sum(index < limit for index in self._missing)
    return again + max(0, limit - self._submitted)

  def submit(self) -> int:
    """Hands out an index: the lowest one to be submitted again, or a new one.

    Raises:
      PoolError: N items are submitted from the head on.
    """
    index = self._missing[0] if self._missing else self._submitted
    if index >= self.head + self.config.in_flight:
      raise errors.PoolError(
        f"group {index} may not be submitted: head {self.head}, "
        f"{self.config.in_flight} groups in flight at most"
      )
    if self._missing:
      return heapq.heappop(self._missing)
    self._submitted += 1
    return index

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
    heapq.heappush(self._missing, index)

  def complete(self, index: int) -> None:
    """Marks a submitted item as completed; a second time changes nothing.

    Raises:
      PoolError: the item was not submitted, or was given back.
    """
    self.expect(index)
    if index not in self._completed and index not in self._consumed:
      self._insert(index)

  def expect(self, index: int) -> None:
    """Raises unless the item is in progress, completed or consumed.

    Raises:
      PoolError: the item was not submitted, or was given back.
    """
    if not 0 <= index < self._submitted or index in self._missing:
      raise errors.PoolError(
        f"group {index} is not in progress; {self._submitted} groups were "
        f"submitted, {len(self._missing)} of them wait for another attempt"
      )

  def available(self) -> int:
    """How many items `take` could hand out now, one after the other."""
    return self._available

  def takeable(self) -> list[int]:
    """The completed items in the window as it lies now, ascending."""
    end = self.head + self.config.width
    return [i for i in range(self.head, end) if i in self._completed]

  def take(self, count: int) -> list[int]:
    """Consumes `count` items, each the lowest in the window of its moment.

    Raises:
      PoolError: fewer are available; nothing is consumed.
    """
    if count > self._available:
      raise errors.PoolError(
        f"{count} groups were asked for, {self._available} are available: "
        f"head {self.head}, window {self.config.width}"
      )
    taken = [heapq.heappop(self._waiting) for _ in range(count)]
    for index in taken:
      self._completed.remove(index)
      self._consumed.add(index)
    self._available -= count
    return taken

  def state(self) -> dict[str, Any]:
    """Everything there is to restore, as JSON."""
    return {
      "submitted": self._submitted,
      "consumed": self._consumed.state(),
      "completed": sorted(self._completed),
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues from a state; what was in progress is submitted again."""
    self._resume(
      Frontier(**state["consumed"]), state["completed"], state["submitted"]
    )

  def _resume(
    self, consumed: Frontier, completed: Iterable[int], submitted: int
  ) -> None:
    self._consumed = consumed
    self._submitted = max(submitted, consumed.head)
    self._completed: set[int] = set()
    self._waiting: list[int] = []  # heap of the completed items
    # The lowest item that is neither consumed nor completed. Taking items one
    # after the other moves the head up to it and no further, so all completed
    # items below `_solid + W` are available.
    self._solid = consumed.head
    self._available = 0
    for index in sorted(completed):
      self._insert(index)
    self._advance()
    self._missing = [  # heap of what is to be submitted again
      index
      for index in range(consumed.head, self._submitted)
      if index not in consumed and index not in self._completed
    ]

  def _insert(self, index: int) -> None:
    self._completed.add(index)
    heapq.heappush(self._waiting, index)
    self._available += index < self._solid + self.config.width
    self._advance()

  def _advance(self) -> None:
    width = self.config.width
    while self._solid in self._completed or self._solid in self._consumed:
      # The window can now slide one further: over one more item, which counts
      # if it is completed.
      self._available += self._solid + width in self._completed
      self._solid += 1
