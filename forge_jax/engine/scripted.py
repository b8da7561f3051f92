"""An engine that plays a script instead of sampling from a model.

For tests, dry runs and benchmarks of whatever talks to an engine. It honours
budgets, stop tokens and strings, aborts and weight versions. The script is what
was sampled, whatever the distribution that a request asks for; but it must be
of the grammar that is asked for. Log-probabilities are made up, and the same for the same seed,
position and token; so are the tokens reported beside a sampled one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from forge_jax import errors, types
from forge_jax.engine import api

_POLL = 0.005  # seconds between looks at whether a pause is over


class ScriptedEngine:
  """Replies to each request with the tokens that `reply` returns for it."""

  def __init__(
    self,
    reply: Callable[[api.GenerateRequest], Sequence[int]],
    *,
    max_context: int = 4096,
    delay: float = 0.0,
    decode: Callable[[Sequence[int]], str] | None = None,
    follows: Callable[[str, Sequence[int], bool], bool] | None = None,
  ):
    """Plays a script.

    Args:
      reply: tokens of the response; cut at the first stop token or string, or
        where the budget or the context ends.
      max_context: most tokens of prompt and response.
      delay: seconds before each token; 0 gives the whole reply in one chunk.
      decode: tokens to text; needed by requests with stop strings only.
      follows: given a grammar and tokens, whether they are of it, or, if a
        third argument is false, begin what is (`grammar.Grammars.follows`);
        needed by requests with a grammar only.
    """
    self._reply = reply
    self._max_context = max_context
    self._delay = delay
    self._decode = decode
    self._follows = follows
    self._version = 0
    self._paused = False
    self._running: set[str] = set()
    self._aborted: set[str] = set()
    self._counts = {"requests": 0, "aborted": 0, "tokens_sampled": 0}
    self._counts["flushes"] = 0

  @property
  def max_context(self) -> int:
    return self._max_context

  async def generate(
    self, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    self._counts["requests"] += 1
    tokens, stop_reason = self._script(request)
    self._running.add(request.id)
    try:
      step = 1 if self._delay else max(1, len(tokens))
      for start in range(0, len(tokens), step):
        if self._delay:
          await asyncio.sleep(self._delay)
        while self._paused and request.id not in self._aborted:
          await asyncio.sleep(_POLL)
        if request.id in self._aborted:
          self._counts["aborted"] += 1
          yield api.TokenChunk((), (), (), types.StopReason.ABORT)
          return
        end = start + step
        last = stop_reason if end >= len(tokens) else None
        yield self._chunk(request, tokens[start:end], start, last)
      if not tokens:
        yield api.TokenChunk((), (), (), stop_reason)
    finally:
      self._running.discard(request.id)
      self._aborted.discard(request.id)

  def abort(self, request_id: str) -> None:
    if request_id in self._running:
      self._aborted.add(request_id)

  def update_weights(self, weights: types.WeightsVersion) -> None:
    self._version = weights.version

  def flush_cache(self) -> None:
    self._counts["flushes"] += 1

  def pause(self) -> None:
    self._paused = True

  def resume(self) -> None:
    self._paused = False

  def settle(self, timeout: float) -> None:
    pass

  def stats(self) -> Mapping[str, float]:
    return {
      **self._counts,
      "running": len(self._running),
      "version": self._version,
    }

  def _script(
    self, request: api.GenerateRequest
  ) -> tuple[tuple[int, ...], types.StopReason]:
    """The tokens to play and why they end."""
    api.check(request, self._max_context)
    if self._follows is None:
      api.refuse(request, "grammar")
    sampling = request.sampling
    room = self._max_context - len(request.prompt_ids)
    if sampling.stop_strings and self._decode is None:
      raise errors.EngineError("stop strings need a scripted engine's `decode`")
    tokens = tuple(map(int, self._reply(request)))
    tokens = tokens[: min(room, sampling.max_tokens)]
    for n, token in enumerate(tokens, 1):
      if token in sampling.stop_token_ids or (
        sampling.stop_strings
        and any(s in self._decode(tokens[:n]) for s in sampling.stop_strings)
      ):
        tokens, reason = tokens[:n], types.StopReason.STOP
        break
    else:
      reason = types.StopReason.LENGTH
    self._check_grammar(sampling, tokens)
    return tokens, reason

  def _check_grammar(
    self, sampling: api.SamplingParams, tokens: tuple[int, ...]
  ) -> None:
    """Makes sure that the script could have been sampled."""
    if sampling.grammar is None:
      return
    whole = bool(tokens) and tokens[-1] in sampling.stop_token_ids
    said = tokens[:-1] if whole else tokens
    if not self._follows(sampling.grammar, said, whole):
      raise errors.EngineError(
        f"the script {said} is not of the grammar that the request asks for"
      )

  def _chunk(
    self,
    request: api.GenerateRequest,
    tokens: tuple[int, ...],
    start: int,
    stop_reason: types.StopReason | None,
  ) -> api.TokenChunk:
    self._counts["tokens_sampled"] += len(tokens)
    return api.TokenChunk(
      token_ids=tokens,
      logprobs=tuple(
        scripted_logprob(request.sampling.seed, position, token)
        for position, token in enumerate(tokens, start)
      ),
      versions=(self._version,) * len(tokens),
      stop_reason=stop_reason,
      top_logprobs=tuple(
        _alternatives(request.sampling, position, token)
        for position, token in enumerate(tokens, start)
      )
      if request.sampling.top_logprobs
      else (),
    )


def _alternatives(
  sampling: api.SamplingParams, position: int, token: int
) -> tuple[tuple[int, float], ...]:
  """The sampled token, then tokens beside it, each less likely by a nat."""
  logprob = scripted_logprob(sampling.seed, position, token)
  return tuple(
    (token - n if n <= token else token + n, logprob - n)
    for n in range(sampling.top_logprobs)
  )


def scripted_logprob(seed: int, position: int, token: int) -> float:
  """A made-up log-probability in nats, in [-1, 0)."""
  mixed = (seed * 1000003 + position * 40503 + token * 69069) % 1024
  return -(mixed + 1) / 1024
