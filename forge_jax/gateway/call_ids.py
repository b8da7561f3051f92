"""The ids of tool calls, as the model and as the client know them.

The gateway gives each call an id that is unlike every other of the session. Some
models write ids of their own (Kimi K2: `functions.bash:0`), and some clients
change ids when a conversation is resumed. What a model is shown has its own ids
wherever they are known, on calls and on their results, and a result has the name
of its call.
"""

from collections.abc import Mapping
from typing import Any

from forge_jax import types

NATIVE = "native_id"  # of a recorded call: the id that the model wrote


def native_ids(reply: types.Message) -> dict[str, str]:
  """The ids that the model wrote in a recorded reply, by those it was given."""
  return {
    call["id"]: call[NATIVE]
    for call in reply.get("tool_calls") or ()
    if call.get(NATIVE)
  }


def as_the_model_knows(
  sent: types.Messages, shown: types.Messages, native: Mapping[str, str]
) -> list[types.Message]:
  """Messages with the model's ids on calls and results.

  Args:
    sent: a conversation as the client sends it.
    shown: it with replayed turns as they were sampled.
    native: see `native_ids`; of the whole session.
  """
  known: dict[str, str] = {}  # the client's ids -> the model's
  names: dict[str, str] = {}  # the model's ids -> what is called
  messages = []
  for one, other in zip(sent, shown, strict=True):
    if calls := other.get("tool_calls"):
      renamed = [_renamed(call, native) for call in calls]
      for theirs, call in zip(one["tool_calls"], renamed, strict=True):
        known[theirs["id"]] = call["id"]
        names[call["id"]] = call["function"]["name"]
      other = {**other, "tool_calls": renamed}
    elif other["role"] == "tool":
      id = other.get("tool_call_id", "")
      id = known.get(id) or native.get(id, id)
      name = {"name": names[id]} if id in names else {}
      other = {**name, **other, "tool_call_id": id}
    messages.append(other)
  return messages


def _renamed(
  call: Mapping[str, Any], native: Mapping[str, str]
) -> dict[str, Any]:
  call = {name: value for name, value in call.items() if name != NATIVE}
  call["id"] = native.get(call.get("id", ""), call.get("id", ""))
  return call
