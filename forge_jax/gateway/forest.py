"""The forest of completions that one session has recorded.

Invariant: a node is one completion; its prompt is its parent's prompt and
response, as sampled, followed by the node's own added ids. Nothing that was
sampled is ever encoded again.
"""

from collections.abc import Container, Iterable
import dataclasses
from typing import Any

import numpy as np

from forge_jax import types
from forge_jax.gateway import template, wire


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Node:
  """One recorded completion."""

  number: int  # of its request, in the session
  name: str
  parent: "Node | None"
  fork_reason: str | None
  added_ids: np.ndarray  # int32, prompt ids beyond the parent's tokens
  response_ids: np.ndarray  # int32
  logprobs: np.ndarray  # float32, nats
  versions: np.ndarray  # int32
  stop_reason: types.StopReason
  started: float  # seconds since the session was opened
  finished: float  # seconds since the session was opened
  first_token: float | None = None  # seconds since the session was opened
  malformed: bool = False  # a tool call was attempted that is none
  plain: bool = True  # sampled from the policy's own distribution
  request: types.Request | None = None
  written: template.Written | None = None  # the prompt, by a chat template

  def prompt_ids(self) -> np.ndarray:
    """The whole prompt, int32."""
    pieces = [self.added_ids]
    node = self.parent
    while node is not None:
      pieces += [node.response_ids, node.added_ids]
      node = node.parent
    return np.concatenate(pieces[::-1])

  def token_ids(self) -> np.ndarray:
    """The whole prompt and the response, int32."""
    return np.concatenate([self.prompt_ids(), self.response_ids])


def completions(
  nodes: Iterable[Node], lost: Container[str] = ()
) -> tuple[types.Completion, ...]:
  """Nodes as completions; each comes after its parent, which is among them.

  Args:
    nodes: of the forest.
    lost: names of those that did not arrive.

  Returns:
    A prompt that another goes on from is a view of the other's, so that a
    session takes room for its length, not its square.
  """
  nodes = list(nodes)
  prompts: dict[int, np.ndarray] = {}
  for node in reversed(nodes):
    if node.number not in prompts:
      prompts[node.number] = node.prompt_ids()
    prompt, above = prompts[node.number], node.parent
    length = len(prompt) - len(node.added_ids)
    while above is not None and above.number not in prompts:
      length -= len(above.response_ids)
      prompts[above.number] = prompt[:length]
      length -= len(above.added_ids)
      above = above.parent
  return tuple(
    _completion(node, prompts[node.number], node.name not in lost)
    for node in nodes
  )


def to_json(nodes: Iterable[Node]) -> list[dict[str, Any]]:
  """The forest as JSON: a prompt and a response node per completion.

  A node has id, parent, role, the token_ids it adds, whether they were sampled,
  and the mismatch that kept its request from extending more. A sampled one has
  how it ended, whether a tool call in it is malformed, and what asked for it.
  """
  values = []
  for node in nodes:
    values.append(
      {
        "id": f"{node.name}/prompt",
        "parent": node.parent.name if node.parent else None,
        "role": "prompt",
        "token_ids": node.added_ids.tolist(),
        "sampled": False,
        "mismatch": node.fork_reason,
      }
    )
    values.append(
      {
        "id": node.name,
        "parent": f"{node.name}/prompt",
        "role": "assistant",
        "token_ids": node.response_ids.tolist(),
        "sampled": True,
        "mismatch": None,
        "stop_reason": node.stop_reason.value,
        "malformed": node.malformed,
        "request": wire.request_to_json(node.request),
      }
    )
  return values


def _completion(
  node: Node, prompt_ids: np.ndarray, delivered: bool
) -> types.Completion:
  return types.Completion(
    id=node.name,
    prompt_ids=prompt_ids,
    response_ids=node.response_ids,
    logprobs=node.logprobs,
    versions=node.versions,
    stop_reason=node.stop_reason,
    parent=node.parent.name if node.parent else None,
    fork_reason=node.fork_reason,
    started=node.started,
    finished=node.finished,
    first_token=node.first_token,
    malformed=node.malformed,
    plain=node.plain,
    delivered=delivered,
    request=node.request,
  )
