"""What a rollout engine is: tokens in; tokens, log-probabilities, versions out.

This module imports no JAX. The gateway, and every other client, reaches an
engine only through `Engine`, so that the built-in engine, a server of ours in
another process and sglang-jax are interchangeable.
"""

from collections.abc import AsyncIterator, Mapping
import dataclasses
import math
from typing import Protocol

import numpy as np

from forge_jax import errors, types

# Most alternatives that a request may ask for beside each sampled token.
MOST_TOP_LOGPROBS = 20
LEAST_REPETITION_PENALTY = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
  """How one completion is sampled.

  A token's distribution is made from the logits in this order: repetition
  penalty, presence and frequency penalties, bias, grammar, temperature, top-k,
  top-p, min-p; each of the last three acts on what the one before has left.

  Log-probabilities are reported under the distribution that is sampled from:
  after all of these. At temperature 0 the sampled token is the most likely one
  that is allowed, and its log-probability that of temperature 1.

  An engine that cannot honour a field refuses a request that sets it, with an
  `EngineError` that names the field.
  """

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0  # 0: no limit
  top_p: float = 1.0
  min_p: float = 0.0  # least share of the most likely token's probability
  # Taken from the logits of tokens that the response already has: once, and as
  # often as it has them.
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  # Divides the positive and multiplies the negative logits of tokens that
  # prompt or response already have.
  repetition_penalty: float = 1.0
  logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
  # The text, stop token aside, is of this grammar, which is written in
  # llguidance's variant of Lark; None: any text.
  grammar: str | None = None
  seed: int = 0  # the same seed, prompt and weights sample the same tokens
  stop_token_ids: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  top_logprobs: int = 0  # most likely tokens to report with each sampled one

  @property
  def plain(self) -> bool:
    """Whether tokens are drawn from the policy's own distribution.

    Only then is a recorded log-probability what the same weights give the
    token in training.
    """
    return self == dataclasses.replace(
      self,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      min_p=0.0,
      presence_penalty=0.0,
      frequency_penalty=0.0,
      repetition_penalty=1.0,
      logit_bias=(),
      grammar=None,
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
  """One completion to sample.

  Raises:
    EngineError: a token id does not fit 32 bits.
  """

  id: str
  prompt_ids: np.ndarray  # int32; may be given as any sequence of integers
  sampling: SamplingParams
  # Sessions share an engine fairly; "": the request is one of its own.
  session: str = ""
  priority: int = 0  # a higher one goes first, and preempts lower ones

  def __post_init__(self):
    try:
      ids = np.asarray(self.prompt_ids, np.int32)
    except OverflowError as error:
      raise errors.EngineError(
        f"request {self.id}: a token id of the prompt does not fit 32 bits"
      ) from error
    object.__setattr__(self, "prompt_ids", ids)


def check(
  request: GenerateRequest, max_context: int, vocab_size: int | None = None
) -> None:
  """Refuses a request that no engine of these sizes could honour.

  Raises:
    ContextOverflowError: the prompt leaves no room for a token.
    EngineError: a token or a number is out of bounds.
  """
  prompt, sampling = request.prompt_ids, request.sampling
  if not len(prompt):
    raise errors.EngineError(f"request {request.id}: the prompt is empty")
  if len(prompt) >= max_context:
    raise errors.ContextOverflowError(
      f"the prompt has {len(prompt)} tokens; the context holds {max_context}, "
      "prompt and response together"
    )
  bounds = {
    "max_tokens": (1, math.inf),
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-math.inf, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "repetition_penalty": (LEAST_REPETITION_PENALTY, math.inf),
    "top_logprobs": (0, MOST_TOP_LOGPROBS),
  }
  for name, (low, high) in bounds.items():
    value = getattr(sampling, name)
    if not low <= value <= high or not math.isfinite(value):
      raise errors.EngineError(
        f"request {request.id}: {name}={value}, expected a number from {low} "
        f"to {high}"
      )
  for token, bias in sampling.logit_bias:
    if not math.isfinite(bias):
      raise errors.EngineError(
        f"request {request.id}: logit_bias of token {token} is {bias}"
      )
  if vocab_size is not None:
    biased = [token for token, _ in sampling.logit_bias]
    for token in (prompt.min(), prompt.max(), *biased):
      if not 0 <= token < vocab_size:
        raise errors.EngineError(
          f"request {request.id}: token id {token} is outside the vocabulary "
          f"of {vocab_size}"
        )


def refuse(request: GenerateRequest, *fields: str) -> None:
  """Refuses a request that sets a field of its sampling.

  Raises:
    EngineError: a field has another value than its default; it is named.
  """
  defaults = SamplingParams(max_tokens=1)
  for name in fields:
    value = getattr(request.sampling, name)
    if value != getattr(defaults, name):
      raise errors.EngineError(
        f"request {request.id}: {name}={value!r:.80} is not supported by this "
        "engine"
      )


@dataclasses.dataclass(frozen=True, slots=True)
class TokenChunk:
  """Tokens sampled since the previous chunk; the tuples align."""

  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  versions: tuple[int, ...]
  stop_reason: types.StopReason | None = None  # set on the last chunk only
  # For each token the most likely tokens in its place, likeliest first, with
  # their log-probabilities under the same distribution: as many as were asked
  # for, or fewer where fewer are possible. Empty if none were asked for.
  top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


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
      GrammarError: the grammar is malformed, or too much for the engine.
      EngineError: the request is malformed or the engine has failed.
    """

  def abort(self, request_id: str) -> None:
    """Ends a request early: its iterator yields a final chunk, ABORT."""

  def update_weights(self, weights: types.WeightsVersion) -> None:
    """Swaps the weights between two engine steps; no request is dropped.

    It takes as long as the weights take to arrive, so that it is called from a
    thread without an event loop, or from `asyncio.to_thread`. A request made
    after it has returned is sampled from these weights.

    Raises:
      EngineError: the weights are refused, and the old ones stay and serve.
    """

  def flush_cache(self) -> None:
    """Forgets cached prefixes: a later request reuses nothing from before.

    Raises:
      EngineError: the engine does not confirm it.
    """

  def pause(self) -> None:
    """Stops sampling; requests stay where they are, and new ones wait."""

  def resume(self) -> None:
    """Ends a pause."""

  def stats(self) -> Mapping[str, float]:
    """Running figures: tokens sampled, tokens prefilled, cache hits, ..."""


class LocalEngine(Engine, Protocol):
  """An engine of this process, as a server of it needs it."""

  def settle(self, timeout: float) -> None:
    """Waits until whatever was asked of the engine before has taken effect.

    Args:
      timeout: seconds.

    Raises:
      EngineUnavailableError: the engine is stopped, or too slow.
    """
