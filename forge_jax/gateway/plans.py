"""A request between the session that has found its place and the engine."""

import dataclasses
import functools

import numpy as np

from forge_jax import types
from forge_jax.gateway import (
  addition,
  attempts,
  forest,
  lineages,
  raw_prompts,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A request that is about to be sampled."""

  number: int
  request_id: str
  seed: int
  parent: forest.Node | None
  fork_reason: str | None
  added: addition.Addition  # what it adds to its parent's tokens
  asked: lineages.Match | raw_prompts.Prompt
  tools: bytes  # digest of its tools, and of what else the prompt depends on
  started: float  # seconds since the session was opened
  request: types.Request | None = None
  attempt: attempts.Attempt | None = None
  choice: int = 0  # of the attempt

  @property
  def added_ids(self) -> np.ndarray:
    """The prompt's ids beyond the parent's tokens, int32."""
    return self.added.ids

  @functools.cached_property
  def prompt_ids(self) -> np.ndarray:
    """The whole prompt, int32."""
    if self.parent is None:
      return self.added_ids
    return np.concatenate([self.parent.token_ids(), self.added_ids])
