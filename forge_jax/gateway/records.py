"""What the journal says of a session; `replay` reads it.

A session's records are, in order: its opening, then completions, rewards and
what the Responses protocol stores (see `stored`), as they came. A completion
holds what it adds to its parent, tokens and messages, so that a session's
records take room for its length.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import time
from typing import Any

import numpy as np

from forge_jax import types
from forge_jax.gateway import forest, lineages, raw_prompts, template, wire

_DTYPES = {
  "added_ids": np.int32,
  "response_ids": np.int32,
  "logprobs": np.float32,
  "versions": np.int32,
}
_NODE = tuple(field.name for field in dataclasses.fields(forest.Node))


def opening(
  id: str,
  seed: int,
  sampling: Mapping[str, float],
  keys: tuple[bytes, bytes],
) -> dict[str, Any]:
  """A session that was opened; `keys` are the digests of its two keys."""
  return {
    "kind": "opening",
    "id": id,
    "seed": seed,
    "sampling": dict(sampling),
    "keys": keys,
    "opened": time.time(),
  }


def rewards(given: Sequence[types.Reward], key: str | None) -> dict[str, Any]:
  """Rewards that were posted, and under what key, if any."""
  values = [wire.reward_to_json(r) for r in given]
  return {"kind": "rewards", "rewards": values, "key": key}


def lost(names: Iterable[str]) -> dict[str, Any]:
  """Completions that did not arrive."""
  return {"kind": "lost", "completions": list(names)}


def completion(
  node: forest.Node,
  asked: lineages.Match | raw_prompts.Prompt,
  tools: bytes,
  reply: types.Message | str | None,
) -> dict[str, Any]:
  """A completion that was sampled.

  Args:
    node: of the forest.
    asked: where its request belonged, or its raw prompt.
    tools: digest of what the prompt depends on beside messages.
    reply: what is delivered; None: nothing.
  """
  value = {name: getattr(node, name) for name in _NODE}
  for name in _DTYPES:
    value[name] = value[name].tobytes()
  value["parent"] = None if node.parent is None else node.parent.number
  value["stop_reason"] = node.stop_reason.value
  value["request"] = wire.request_to_json(node.request)
  if node.written is not None:
    value["written"] = dataclasses.astuple(node.written)
  if isinstance(asked, lineages.Match):
    new = slice(None if node.parent is None else asked.depth, None)
    asked = asked.messages[new]
  said = {"said": asked, "tools": tools, "reply": reply}
  return {"kind": "completion", "node": value, **said}


def read_node(
  value: Mapping[str, Any], nodes: Mapping[int, forest.Node]
) -> forest.Node:
  """The node that a completion's record holds; `nodes` by number."""
  parent, written = value["parent"], value.get("written")
  arrays = {
    name: np.frombuffer(value[name], dtype) for name, dtype in _DTYPES.items()
  }
  return forest.Node(
    **{
      **value,
      **arrays,
      "parent": None if parent is None else nodes[parent],
      "stop_reason": types.StopReason(value["stop_reason"]),
      "request": wire.request_from_json(value["request"]),
      "written": written and template.Written(*written),
    }
  )
