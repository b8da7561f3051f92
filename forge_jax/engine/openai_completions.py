"""An engine behind an OpenAI-compatible server that tells token ids.

For recording what a server samples whose weights somebody else keeps: vLLM
(from 0.10.2) or SGLang (from July 2026), by `POST /v1/completions` with a
prompt of token ids and `return_token_ids`. Everything else, template, parsing,
lineages, is the gateway's, as for any engine. What is recorded is exact or not
recorded:

  - The prompt's ids must come back as they were sent, and the response's ids
    and log-probabilities one for one; else the request fails. `connect` samples
    one token to see that they do.
  - vLLM reports log-probabilities of the plain distribution unless started with
    --logprobs-mode processed_logprobs, which it does not tell. So requests that
    change the distribution are refused unless `exact_logprobs` is off.
  - There are no weights to update, no cache to flush, nothing to pause, and the
    version of every token is the one that the configuration says.
"""

from collections.abc import AsyncIterator, Mapping
import dataclasses
from typing import Any

from forge_jax import errors, types
from forge_jax.engine import api, generate_reply, remote

_ROUTE = "/v1/completions"
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
# Sampling parameters of one name, which are sent if they do something.
_SAME = (
  "top_k",
  "top_p",
  "min_p",
  "presence_penalty",
  "frequency_penalty",
  "repetition_penalty",
)


@dataclasses.dataclass(frozen=True)
class CompletionsConfig(remote.RemoteConfig):
  """How to reach an OpenAI-compatible server; `url` is without "/v1"."""

  model: str = ""  # of those it lists; "": the first
  max_context: int = 0  # in tokens; 0: what it says in `max_model_len`
  version: int = 0  # of its weights


class CompletionsEngine(remote.RemoteEngine):
  """An `engine.api.Engine` that records; used from one asyncio loop."""

  def __init__(self, config: CompletionsConfig):
    """Prepares a client; `connect` reaches the server."""
    super().__init__(config)
    self._config: CompletionsConfig = config
    self._version = config.version
    self._model = config.model

  def update_weights(self, weights: types.WeightsVersion) -> None:
    """Raises EngineError: the weights are not ours."""
    raise self._only_records("its weights cannot be updated")

  def flush_cache(self) -> None:
    """Raises EngineError: the cache is not ours."""
    raise self._only_records("its cache cannot be flushed")

  def pause(self) -> None:
    """Raises EngineError: others use the server."""
    raise self._only_records("it cannot be paused")

  def resume(self) -> None:
    """Raises EngineError: others use the server."""
    raise self._only_records("it cannot be paused")

  async def _learn(self) -> None:
    listed = await self._get("/v1/models")
    try:
      models = {one["id"]: one for one in listed["data"]}
      name = self._config.model or next(iter(models))
      longest = self._config.max_context or models[name]["max_model_len"]
    except (StopIteration, *_MALFORMED) as error:
      raise errors.EngineError(
        f"{self._where}: /v1/models has no model {self._config.model!r} with a "
        f"max_model_len: {listed!r:.200}"
      ) from error
    self._model = name
    sampling = api.SamplingParams(max_tokens=1)
    probe = api.GenerateRequest("probe", (0,), sampling)
    async for _ in self._chunks(probe, probe.id):
      pass
    self._max_context = longest

  def _check(self, request: api.GenerateRequest) -> None:
    api.refuse(request, "grammar", "top_logprobs")
    plain = dataclasses.replace(request.sampling, temperature=1.0).plain
    if self._config.exact_logprobs and not (
      plain and request.sampling.temperature in (0.0, 1.0)
    ):
      raise errors.EngineError(
        f"request {request.id}: {self._where} may report log-probabilities "
        "from before temperature, penalties and filters; with exact_logprobs "
        "off they are taken as they are"
      )

  async def _chunks(
    self, request: api.GenerateRequest, rid: str
  ) -> AsyncIterator[api.TokenChunk]:
    body, begun, reason = self._body(request), False, None
    with self._reaching(_ROUTE):
      async with self._session().post(_ROUTE, json=body) as response:
        if response.status != 200:
          await self._json(response)
        async for value in remote.events(response):
          if isinstance(value, Mapping) and "error" in value:
            raise generate_reply.failure(self._where, value)
          try:
            if not value["choices"]:
              continue  # the counts, at the end
            choice = value["choices"][0]
            chunk = self._chunk(choice)
            if chunk.token_ids and not begun:
              begun = True
              self._check_prompt(request, choice)
          except _MALFORMED as error:
            raise errors.EngineError(
              f"{self._where}: a reply is malformed: {error!r} in "
              f"{value!r:.300}"
            ) from error
          reason = chunk.stop_reason or reason
          if chunk.token_ids:
            yield dataclasses.replace(chunk, stop_reason=None)
    if reason is not None:
      yield api.TokenChunk((), (), (), reason)

  def _body(self, request: api.GenerateRequest) -> dict[str, Any]:
    sampling = request.sampling
    defaults = api.SamplingParams(max_tokens=1)
    body = {
      "model": self._model,
      "prompt": request.prompt_ids.tolist(),
      "max_tokens": sampling.max_tokens,
      "temperature": sampling.temperature,
      "seed": sampling.seed,
      "logprobs": 0,  # of the sampled tokens, and of no others
      "return_token_ids": True,
      "stream": True,
      "stop": list(sampling.stop_strings),
      "stop_token_ids": list(sampling.stop_token_ids),
      "skip_special_tokens": False,
    }
    for name in _SAME:
      if (value := getattr(sampling, name)) != getattr(defaults, name):
        body[name] = value
    if sampling.logit_bias:
      body["logit_bias"] = {str(id): bias for id, bias in sampling.logit_bias}
    return body

  def _chunk(self, choice: Mapping[str, Any]) -> api.TokenChunk:
    reason = choice.get("finish_reason")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    ids = choice.get("token_ids")
    if ids is None and (choice.get("text") or logprobs):
      raise self._only_records(
        "it returned no token_ids. What is recorded must be the ids that were "
        "sampled: vLLM from 0.10.2 and SGLang from July 2026 return them"
      )
    ids = tuple(ids or ())
    if len(logprobs) != len(ids):
      raise ValueError(f"{len(ids)} token_ids, {len(logprobs)} token_logprobs")
    return api.TokenChunk(
      ids,
      tuple(float(one) for one in logprobs),
      (self._version,) * len(ids),
      None if reason is None else types.StopReason(reason),
    )

  def _check_prompt(
    self, request: api.GenerateRequest, choice: Mapping[str, Any]
  ) -> None:
    """Whether the server sampled after the very prompt that was sent."""
    found = choice.get("prompt_token_ids")
    if found is None or list(found) != request.prompt_ids.tolist():
      raise self._only_records(
        f"of a prompt of {len(request.prompt_ids)} tokens it returned "
        f"{'none' if found is None else f'other ids, {len(found)} of them'}"
      )

  def _only_records(self, what: str) -> errors.EngineError:
    return errors.EngineError(
      f"{self._where} is an OpenAI-compatible server, for recording only: {what}"
    )
