"""What a session keeps for later requests of the Responses protocol.

Invariants:
  1. A response is stored whole, before the client has seen its end, and never
     changes.
  2. A response holds the items of its own request only, and the response that
     it follows: an item of a chain is kept once.
  3. Deleting a response hides it and its items. Responses that follow it go on
     seeing them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from forge_jax.gateway import refusal

Item = Mapping[str, Any]  # an item of the protocol; stored ones have an id


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StoredResponse:
  """A finished response and the conversation that it belongs to."""

  id: str
  value: Mapping[str, Any]  # what the client was sent
  items: tuple[Item, ...]  # its request's input
  output: tuple[Item, ...]
  previous: "StoredResponse | None"

  def context(self) -> list[Item]:
    """The items that the response saw, those of earlier responses first."""
    turns, turn = [self.items], self.previous
    while turn is not None:
      turns += [turn.output, turn.items]
      turn = turn.previous
    return [item for items in reversed(turns) for item in items]


@dataclasses.dataclass(frozen=True, slots=True)
class IssuedCall:
  """A tool call as the model made it and as the client was sent it."""

  arguments: str  # text of a JSON object
  sent: str  # what the client was sent instead


class Stored:
  """Holds the responses of one session, by id."""

  def __init__(self, log: Callable[[Mapping[str, Any]], None]):
    """Begins empty; `log` is told of each change, as `records` reads it."""
    self._log = log
    self._responses: dict[str, StoredResponse] = {}
    self._items: dict[str, Item] = {}
    self._calls: dict[str, IssuedCall] = {}

  def add(self, response: StoredResponse) -> None:
    """Stores a response."""
    self._log(
      {
        "kind": "response",
        "id": response.id,
        "value": response.value,
        "items": response.items,
        "output": response.output,
        "previous": response.previous and response.previous.id,
      }
    )
    self._responses[response.id] = response
    self._name_items(response)

  def response(self, id: str) -> StoredResponse:
    """A stored response.

    Raises:
      Refusal: there is none of that id.
    """
    if id not in self._responses:
      raise refusal.Refusal(
        f"no response {id!r} is stored in this session", status=404
      )
    return self._responses[id]

  def previous(self, id: str) -> StoredResponse:
    """The response that a request names as the one before it.

    Raises:
      Refusal: there is none of that id.
    """
    if id not in self._responses:
      raise refusal.Refusal(
        f"previous_response_id: no response {id!r} is stored in this session",
        param="previous_response_id",
        code="previous_response_not_found",
      )
    return self._responses[id]

  def delete(self, id: str) -> None:
    """Hides a stored response.

    Raises:
      Refusal: there is none of that id.
    """
    del self._responses[self.response(id).id]
    self._log({"kind": "deletion", "id": id})
    # Not only the deleted items: a reference shares an item with another.
    self._items.clear()
    for response in self._responses.values():
      self._name_items(response)

  def item(self, id: str) -> Item | None:
    """An item of a stored response; None if there is none of that id."""
    return self._items.get(id)

  def issue(self, call_id: str, call: IssuedCall) -> None:
    """Remembers a call whose arguments its wire form does not hold."""
    arguments = {"arguments": call.arguments, "sent": call.sent}
    self._log({"kind": "call", "id": call_id, **arguments})
    self._calls[call_id] = call

  def arguments(self, call_id: str, sent: str) -> str | None:
    """What the model wrote where the client was sent `sent`; else None."""
    call = self._calls.get(call_id)
    return call.arguments if call and call.sent == sent else None

  def _name_items(self, response: StoredResponse) -> None:
    for item in (*response.items, *response.output):
      # A client that repeats an item does not change what its id names.
      self._items.setdefault(item["id"], item)


def with_ids(items: Sequence[Item], prefix: str) -> tuple[Item, ...]:
  """The items, those without an id named by `prefix` and their place."""
  return tuple(
    item if item.get("id") else {**item, "id": f"{prefix}_{n}"}
    for n, item in enumerate(items)
  )
