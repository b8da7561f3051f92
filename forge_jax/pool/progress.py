"""What has become of a run's items and tasks, as a checkpoint keeps it.

An *item* is a place in the queue, named by its index; a *task* has a number,
its place in the run's sequence of tasks. Item i is task number i until a
dropped group's task is submitted again as a later item.

Invariants:
  1. An item is consumed once: trained, or dropped.
  2. A task is finished by the item that trains it, or by one that is dropped
     for good. A task that was dropped to be submitted again is neither.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Ticket(NamedTuple):
  """An item that may be rolled out."""

  index: int  # place in the queue, in the order of submission
  number: int  # the task's place in the run's sequence
  attempt: int  # how many groups of the task were dropped before
  step: int  # trainer steps taken when it was submitted


class Frontier:
  """A set of integers that grows almost in order: 0..head-1 and a few more."""

  def __init__(self, head: int = 0, beyond: Iterable[int] = ()):
    self.head = head  # the lowest integer that is not in the set
    self.beyond: set[int] = set()
    for member in beyond:
      self.add(member)

  def __contains__(self, member: int) -> bool:
    return member < self.head or member in self.beyond

  def add(self, member: int) -> None:
    """Adds an integer; adding one twice changes nothing."""
    if member > self.head:
      self.beyond.add(member)
    elif member == self.head:
      self.head += 1
      while self.head in self.beyond:
        self.beyond.remove(self.head)
        self.head += 1

  def state(self) -> dict[str, Any]:
    """The set as JSON; `Frontier(**state)` is its inverse."""
    return {"head": self.head, "beyond": sorted(self.beyond)}


class Progress:
  """The items that are consumed and the tasks that are finished."""

  def __init__(self):
    self.consumed = Frontier()  # indices of items
    self.finished = Frontier()  # numbers of tasks
    self.dropped = 0  # consumed items that were not trained
    self.retries: dict[int, int] = {}  # unfinished tasks dropped: attempts made

  def train(self, ticket: Ticket) -> None:
    """Consumes an item by training it."""
    self.consumed.add(ticket.index)
    self._finish(ticket.number)

  def drop(self, ticket: Ticket, again: bool) -> None:
    """Consumes an item without training it.

    Args:
      ticket: the item's.
      again: whether its task is submitted again.
    """
    self.consumed.add(ticket.index)
    self.dropped += 1
    if again:
      self.retries[ticket.number] = ticket.attempt + 1
    else:
      self._finish(ticket.number)

  def state(self) -> dict[str, Any]:
    """Everything there is to restore, as JSON."""
    return {
      "consumed": self.consumed.state(),
      "finished": self.finished.state(),
      "dropped": self.dropped,
      "retries": sorted(self.retries.items()),
    }

  @classmethod
  def restore(cls, state: Mapping[str, Any]) -> "Progress":
    """The inverse of `state`."""
    self = cls()
    self.consumed = Frontier(**state["consumed"])
    self.finished = Frontier(**state["finished"])
    self.dropped = state["dropped"]
    self.retries = {number: attempt for number, attempt in state["retries"]}
    return self

  def _finish(self, number: int) -> None:
    self.finished.add(number)
    self.retries.pop(number, None)
