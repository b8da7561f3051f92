"""An engine behind SGLang's native HTTP API: ours, sglang-jax's, SGLang's.

Only standard routes and names are used, so that one client drives all three.
Where they differ:

  - SGLang sends a stream's tokens anew with each part unless it is started with
    --incremental-streaming-output; sglang-jax always does, and the lists of
    log-probabilities grow as the square. So replies are streamed where a server
    says that it sends new tokens only, and otherwise awaited whole.
  - Theirs report log-probabilities after temperature and before top-k, top-p,
    min-p. Requests that set these are refused unless `exact_logprobs` is off.
  - SGLang tells one weight version per reply; ours one per token. sglang-jax
    tells none, has no route that updates weights, and keeps one token less of
    the context than it says; here no request asks for that one.

Invariants:
  1. Every request asks for log-probabilities: a server of sglang-jax ends on a
     batch where some do and some do not.
  2. A flush, a pause, an update returns once the server has confirmed it, or
     raises within its time limit.
"""

from collections.abc import AsyncIterator, Mapping
import contextlib
import dataclasses
import time
from typing import Any

import httpx

from forge_jax import errors, types
from forge_jax.engine import api, generate_reply, generate_request, remote

_FILTERS = ("top_k", "top_p", "min_p")  # what cuts a distribution
_BUSY = "running or waiting requests"  # in what SGLang says then


@dataclasses.dataclass(frozen=True)
class SGLangConfig(remote.RemoteConfig):
  """How to reach a server that speaks SGLang's native API."""

  stream: bool | None = None  # None: where the server sends new tokens only
  control_seconds: float = 600.0  # for an update, a flush, a pause


@dataclasses.dataclass(frozen=True)
class SGLangJaxConfig:
  """How to run sglang-jax's engine in this process; see `sglang_jax`."""

  model_path: str
  arguments: Mapping[str, Any]  # more of its `ServerArgs`, by their names
  version: int = 0  # of the weights at the model's path
  update_seconds: float = 600.0  # for running requests to finish


class SGLangEngine(remote.RemoteEngine):
  """An `engine.api.Engine` that is a server; used from one asyncio loop.

  Controls block, and may be called from any thread but the loop's.
  """

  def __init__(self, config: SGLangConfig):
    """Prepares a client; `connect` reaches the server."""
    super().__init__(config)
    self._config: SGLangConfig = config
    self._streams = self._filtered = False

  def update_weights(self, weights: types.WeightsVersion) -> None:
    """See `engine.api.Engine.update_weights`; takes a path the server can read.

    The server loads the folder while it serves, and swaps between two steps.
    """
    if weights.path is None:
      raise errors.EngineError(
        f"weights version {weights.version} carry no path; a server of another "
        "process reads them from a folder"
      )
    self._control(
      "/update_weights_from_disk",
      {"model_path": weights.path, "weight_version": str(weights.version)},
    )
    self._version = weights.version

  def flush_cache(self) -> None:
    """See `engine.api.Engine.flush_cache`.

    SGLang flushes only when nothing runs; it is asked again until then.
    """
    deadline = time.monotonic() + self._config.control_seconds
    while True:
      try:
        return self._control("/flush_cache", {})
      except errors.EngineUnavailableError:
        raise
      except errors.EngineError as error:
        if _BUSY not in str(error) or time.monotonic() > deadline:
          raise
      time.sleep(remote.PAUSE)

  def pause(self) -> None:
    """See `engine.api.Engine.pause`."""
    self._control("/pause_generation", {"mode": "in_place"})

  def resume(self) -> None:
    """See `engine.api.Engine.resume`."""
    self._control("/continue_generation", {})

  async def _learn(self) -> None:
    models = await self._get("/v1/models")
    info = await self._get("/get_server_info")
    try:
      self._max_context = models["data"][0]["max_model_len"] - 1
    except (KeyError, IndexError, TypeError) as error:
      raise errors.EngineError(
        f"{self._where}: /v1/models tells no max_model_len: {models!r:.200}"
      ) from error
    told = bool(info.get("incremental_streaming_output"))
    stream = self._config.stream
    self._streams = told if stream is None else stream
    self._filtered = bool(info.get("filtered_logprobs"))
    version = str(info.get("weight_version"))
    self._version = int(version) if version.isdigit() else self._version

  def _check(self, request: api.GenerateRequest) -> None:
    if self._config.exact_logprobs and not self._filtered:
      try:
        api.refuse(request, *_FILTERS)
      except errors.EngineError as error:
        raise errors.EngineError(
          f"{error}: {self._where} reports log-probabilities from before it; "
          "with exact_logprobs off they are taken as they are"
        ) from error

  async def _chunks(
    self, request: api.GenerateRequest, rid: str
  ) -> AsyncIterator[api.TokenChunk]:
    sampling = request.sampling
    room = self._max_context - len(request.prompt_ids)
    sampling = dataclasses.replace(
      sampling, max_tokens=min(sampling.max_tokens, room)
    )
    body = {
      "rid": rid,
      "input_ids": request.prompt_ids.tolist(),
      "sampling_params": generate_request.sampling_to_json(sampling),
      "return_logprob": True,
      "stream": self._streams,
      **generate_request.turn_to_json(request),
    }
    if sampling.top_logprobs:
      body["top_logprobs_num"] = sampling.top_logprobs
    reader = generate_reply.Reader(self._where, self._version)
    with self._reaching("/generate"):
      async with self._session().post("/generate", json=body) as response:
        if response.status != 200 or not self._streams:
          yield reader.read(await self._json(response))
          return
        async for value in remote.events(response):
          yield reader.read(value)

  async def _abandon(self, rid: str) -> None:
    path, body = "/abort_request", {"rid": rid}
    with contextlib.suppress(errors.EngineError), self._reaching(path):
      async with self._session().post(path, json=body):
        pass

  def _control(self, path: str, body: Mapping[str, Any]) -> None:
    with self._reaching(path):
      response = httpx.post(
        self._where + path,
        json=body,
        headers=self._headers,
        timeout=self._config.control_seconds,
      )
      if response.status_code == 404:
        raise errors.EngineError(f"{self._where}: it has no route {path}")
      if response.is_error:
        try:
          value = response.json()
        except ValueError:
          value = response.text.strip()
        raise generate_reply.failure(self._where, value, response.status_code)
