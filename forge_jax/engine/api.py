"""What a rollout engine is: tokens in; tokens, log-probabilities, versions out.

This module imports no JAX. The gateway, and every other client, reaches an
engine only through `Engine`, so that the built-in engine, a server of ours in
another process and sglang-jax are interchangeable.
"""

from collections.abc import AsyncIterator, Mapping
import dataclasses
from typing import Protocol

from forge_jax import types


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
  """How one completion is sampled.

  Log-probabilities are reported under the distribution that is sampled from:
  after temperature, top-k and top-p. At temperature 0 the sampled token is the
  most likely one and its log-probability that of temperature 1.
  """

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0  # 0: no limit
  top_p: float = 1.0
  seed: int = 0  # the same seed, prompt and weights sample the same tokens
  stop_token_ids: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateRequest:
  """One completion to sample."""

  id: str
  prompt_ids: tuple[int, ...]
  sampling: SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class TokenChunk:
  """Tokens sampled since the previous chunk; the three tuples align."""

  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  versions: tuple[int, ...]
  stop_reason: types.StopReason | None = None  # set on the last chunk only


class Engine(Protocol):
  """A rollout engine, called from an asyncio loop."""

  @property
  def max_context(self) -> int:
    """Most tokens, prompt and response together, of a completion."""

  def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
    """Samples a completion, chunk by chunk.

    The last chunk carries the stop reason. Closing the iterator early aborts
    the request.

    Raises:
      ContextOverflowError: the prompt leaves no room for a token.
      EngineError: the request is malformed or the engine has failed.
    """

  def abort(self, request_id: str) -> None:
    """Ends a request early: its iterator yields a final chunk, ABORT."""

  def update_weights(self, weights: types.WeightsVersion) -> None:
    """Swaps the weights between two engine steps; no request is dropped."""

  def stats(self) -> Mapping[str, float]:
    """Running figures: tokens sampled, tokens prefilled, cache hits, ..."""
