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
  1. Every request asks for log-probabilities: a server of sglang-jax fails on a
     batch where some do and some do not.
  2. A request whose server went away before its first token is sent again, for
     `patience` seconds; once tokens were received, it fails and keeps them.
  3. A flush, a pause, an update returns once the server has confirmed it, or
     raises within its time limit.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from typing import Any

import aiohttp
import httpx

from forge_jax import errors, types
from forge_jax.engine import api, generate_reply, generate_request

_log = logging.getLogger(__name__)
_FILTERS = ("top_k", "top_p", "min_p")  # what cuts a distribution
_PAUSE = 0.2  # seconds before something is tried again
_BUSY = "running or waiting requests"  # in what SGLang says then


@dataclasses.dataclass(frozen=True, slots=True)
class SGLangConfig:
  """How to reach a server that speaks SGLang's native API."""

  url: str = "http://127.0.0.1:30000"
  api_key: str | None = None
  exact_logprobs: bool = True  # refuse what a server cannot report exactly
  stream: bool | None = None  # None: where the server sends new tokens only
  patience: float = 60.0  # seconds in which a server may come back
  silence: float = 1800.0  # most seconds without a part of a reply
  control_seconds: float = 600.0  # for an update, a flush, a pause


class SGLangEngine:
  """An `engine.api.Engine` that is a server; used from one asyncio loop.

  Controls block, and may be called from any thread but the loop's.
  """

  def __init__(self, config: SGLangConfig):
    """Prepares a client; `connect` reaches the server."""
    self._config = config
    self._where = config.url.rstrip("/")
    self._headers = {}
    if config.api_key is not None:
      self._headers["Authorization"] = f"Bearer {config.api_key}"
    self._http: aiohttp.ClientSession | None = None
    self._max_context = 0
    self._streams = self._filtered = False
    self._version = 0
    self._running: dict[str, asyncio.Task] = {}
    self._aborting: set[asyncio.Task] = set()
    self._counts = {"requests": 0, "sampled_tokens": 0, "retries": 0}

  @property
  def max_context(self) -> int:
    return self._max_context

  async def connect(self) -> None:
    """Waits for the server and learns what it is.

    Raises:
      EngineUnavailableError: it is not there within `patience` seconds.
      EngineError: it is no such server.
    """
    deadline = time.monotonic() + self._config.patience
    while True:
      try:
        return await self._learn()
      except errors.EngineError as error:
        away = isinstance(error, errors.EngineUnavailableError)
        if not away or time.monotonic() > deadline:
          await self.aclose()
          raise
      await asyncio.sleep(_PAUSE)

  async def aclose(self) -> None:
    """Closes the connections; requests in flight are aborted."""
    for task in self._running.values():
      task.cancel()
    await asyncio.gather(*self._running.values(), return_exceptions=True)
    await asyncio.gather(*self._aborting)
    if self._http is not None:
      await self._http.close()
      self._http = None

  async def generate(
    self, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    """See `engine.api.Engine.generate`."""
    self._check(request)
    if request.id in self._running:
      raise errors.EngineError(f"request id {request.id} is already in flight")
    self._counts["requests"] += 1
    arrived: asyncio.Queue = asyncio.Queue()
    task = asyncio.create_task(self._fetch(request, arrived))
    self._running[request.id] = task
    try:
      stop_reason = None
      while stop_reason is None:
        item = await arrived.get()
        if isinstance(item, Exception):
          raise item
        self._counts["sampled_tokens"] += len(item.token_ids)
        stop_reason = item.stop_reason
        yield item
    finally:
      del self._running[request.id]
      task.cancel()
      await asyncio.gather(task, return_exceptions=True)

  def abort(self, request_id: str) -> None:
    """See `engine.api.Engine.abort`; an unknown id is ignored."""
    if task := self._running.get(request_id):
      task.cancel()

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
      time.sleep(_PAUSE)

  def pause(self) -> None:
    """See `engine.api.Engine.pause`."""
    self._control("/pause_generation", {"mode": "in_place"})

  def resume(self) -> None:
    """See `engine.api.Engine.resume`."""
    self._control("/continue_generation", {})

  def stats(self) -> Mapping[str, float]:
    """What this client has seen; the server has /metrics of its own."""
    return {
      **self._counts,
      "running": len(self._running),
      "version": self._version,
    }

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
    if not self._max_context:
      raise errors.EngineUnavailableError(f"{self._where}: not connected")
    if len(request.prompt_ids) >= self._max_context:
      raise errors.ContextOverflowError(
        f"the prompt has {len(request.prompt_ids)} tokens; the context holds "
        f"{self._max_context}, prompt and response together"
      )
    if self._config.exact_logprobs and not self._filtered:
      try:
        api.refuse(request, *_FILTERS)
      except errors.EngineError as error:
        raise errors.EngineError(
          f"{error}: {self._where} reports log-probabilities from before it; "
          "with exact_logprobs off they are taken as they are"
        ) from error

  async def _fetch(
    self, request: api.GenerateRequest, arrived: asyncio.Queue
  ) -> None:
    """Puts a completion's chunks, or what became of it, into a queue."""
    reader = generate_reply.Reader(self._where, self._version)
    deadline = time.monotonic() + self._config.patience
    while True:
      # A name of its own, so that a server that still runs an earlier attempt,
      # or another client's request, does not mistake it.
      rid = f"{request.id}-{secrets.token_hex(4)}"
      try:
        async for chunk in self._attempt(request, rid, reader):
          arrived.put_nowait(chunk)
        return
      except asyncio.CancelledError:
        arrived.put_nowait(api.TokenChunk((), (), (), types.StopReason.ABORT))
        task = asyncio.create_task(self._abort(rid))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)
        raise
      except errors.EngineUnavailableError as error:
        if reader.count or time.monotonic() > deadline:
          arrived.put_nowait(error)
          return
        self._counts["retries"] += 1
        _log.warning("request %s is sent again: %s", request.id, error)
        await asyncio.sleep(_PAUSE)
      except Exception as error:  # raised again by whoever reads
        arrived.put_nowait(error)
        return

  async def _attempt(
    self, request: api.GenerateRequest, rid: str, reader: generate_reply.Reader
  ) -> AsyncIterator[api.TokenChunk]:
    """The chunks of one attempt, the last with its stop reason."""
    last = None
    try:
      async with contextlib.aclosing(self._parts(request, rid)) as parts:
        async for value in parts:
          chunk = reader.read(value)
          if chunk.stop_reason is None:
            yield chunk
          else:
            last = chunk  # goes out once the connection is free again
    except errors.EngineUnavailableError:
      if last is None:
        raise
    if last is None:
      raise errors.EngineUnavailableError(f"{self._where}: a reply broke off")
    yield last

  async def _parts(
    self, request: api.GenerateRequest, rid: str
  ) -> AsyncIterator[Any]:
    """The JSON values that the server answers a request with."""
    sampling = request.sampling
    room = self._max_context - len(request.prompt_ids)
    sampling = dataclasses.replace(
      sampling, max_tokens=min(sampling.max_tokens, room)
    )
    body = {
      "rid": rid,
      "input_ids": list(request.prompt_ids),
      "sampling_params": generate_request.sampling_to_json(sampling),
      "return_logprob": True,
      "stream": self._streams,
    }
    if sampling.top_logprobs:
      body["top_logprobs_num"] = sampling.top_logprobs
    with self._reaching("/generate"):
      async with self._session().post("/generate", json=body) as response:
        if response.status != 200 or not self._streams:
          value = await _json(response)
          if response.status != 200:
            raise generate_reply.failure(self._where, value, response.status)
          yield value
          return
        async for data in _events(response):
          if data == b"[DONE]":
            return
          yield json.loads(data)

  async def _abort(self, rid: str) -> None:
    """Tells the server that nobody waits any more; it may be gone itself."""
    path, body = "/abort_request", {"rid": rid}
    with contextlib.suppress(errors.EngineError), self._reaching(path):
      async with self._session().post(path, json=body):
        pass

  async def _get(self, path: str) -> Any:
    with self._reaching(path):
      async with self._session().get(path) as response:
        value = await _json(response)
        if response.status != 200:
          raise generate_reply.failure(self._where, value, response.status)
        return value

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

  def _session(self) -> aiohttp.ClientSession:
    if self._http is None:
      self._http = aiohttp.ClientSession(
        self._where,
        connector=aiohttp.TCPConnector(limit=0),
        headers=self._headers,
        timeout=aiohttp.ClientTimeout(
          total=None, sock_connect=10, sock_read=self._config.silence
        ),
      )
    return self._http

  @contextlib.contextmanager
  def _reaching(self, path: str):
    """What can go wrong on the way, as this engine's errors."""
    try:
      yield
    except (aiohttp.ClientError, httpx.HTTPError, TimeoutError) as error:
      raise errors.EngineUnavailableError(
        f"{self._where}{path}: {type(error).__name__}: {error}"
      ) from error
    except ValueError as error:
      raise errors.EngineError(
        f"{self._where}{path}: the reply is not JSON: {error}"
      ) from error


async def _json(response: aiohttp.ClientResponse) -> Any:
  """The JSON of a reply, or its text where that is all there is."""
  data = await response.read()
  try:
    return json.loads(data)
  except ValueError:
    if response.status == 200:
      raise
    return data.decode(errors="replace").strip() or response.reason


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
  """The data of server-sent events, each on one line, of any length."""
  held = b""
  async for data in response.content.iter_any():
    *lines, held = (held + data).split(b"\n")
    for line in lines:
      if line.startswith(b"data:"):
        yield line.removeprefix(b"data:").strip()
