"""A session made again from its records.

Replaying the records in order makes the same forest, the same lineages and the
same stored responses. Requests that were in flight have left no record. Their
numbers are given again: nobody has seen the end of their replies.
"""

from collections.abc import Mapping
import time
from typing import Any

from forge_jax import types
from forge_jax.gateway import forest, records, sessions, stored, wire


class Replay:
  """A session on the way back."""

  def __init__(self, opening: Mapping[str, Any]):
    """Begins with the record of a session's opening."""
    self.keys: tuple[bytes, bytes] = tuple(opening["keys"])  # digests
    self.session = sessions.Session(
      opening["id"],
      opening["seed"],
      opening["sampling"],
      age=time.time() - opening["opened"],
    )
    self._nodes: dict[int, forest.Node] = {}
    self._conversations: dict[int, list[types.Message]] = {}
    self._responses: dict[str, stored.StoredResponse] = {}

  def apply(self, record: Mapping[str, Any]) -> None:
    """Does again what a record tells of."""
    match record["kind"]:
      case "completion":
        self._complete(record)
      case "rewards":
        rewards = [wire.reward_from_json(r) for r in record["rewards"]]
        self.session.rewards.add(rewards, record.get("key"))
      case "closed":
        self.session.close()
      case "lost":
        self.session.attempts.lost.update(record["completions"])
      case "response":
        self._respond(record)
      case "deletion":
        self.session.stored.delete(record["id"])
      case "call":
        call = stored.IssuedCall(record["arguments"], record["sent"])
        self.session.stored.issue(record["id"], call)

  def _complete(self, record: Mapping[str, Any]) -> None:
    node = records.read_node(record["node"], self._nodes)
    self._nodes[node.number] = node
    reply, said = record["reply"], record["said"]
    if isinstance(reply, dict):
      if node.parent is not None:
        said = [*self._conversations[node.parent.number], *said]
      self._conversations[node.number] = [*said, reply]
    self.session.restore(node, said, record["tools"], reply)

  def _respond(self, record: Mapping[str, Any]) -> None:
    previous = record["previous"]
    response = stored.StoredResponse(
      id=record["id"],
      value=record["value"],
      items=tuple(record["items"]),
      output=tuple(record["output"]),
      previous=None if previous is None else self._responses[previous],
    )
    self._responses[response.id] = response  # deleted ones may be followed
    self.session.stored.add(response)
