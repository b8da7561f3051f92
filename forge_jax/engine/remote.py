"""What engines of other processes have in common: a request over HTTP.

Invariants:
  1. A request whose server went away before its first token is sent again, for
     `patience` seconds; once tokens were received, it fails, and the tokens
     stay with whoever read them.
  2. Whatever ends a request early, its server is told.
"""

import abc
import asyncio
from collections.abc import AsyncIterator, Iterator
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
from forge_jax.engine import api, generate_reply, streams

_log = logging.getLogger(__name__)
PAUSE = 0.2  # seconds before something is tried again


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
  """How to reach a server."""

  url: str = "http://127.0.0.1:30000"
  api_key: str | None = None
  exact_logprobs: bool = True  # refuse what a server cannot report exactly
  patience: float = 60.0  # seconds in which a server may come back
  silence: float = 1800.0  # most seconds without a part of a reply


class RemoteEngine(abc.ABC):
  """The part of an `engine.api.Engine` that is HTTP; used from one loop."""

  def __init__(self, config: RemoteConfig):
    """Prepares a client; `connect` reaches the server."""
    self._config = config
    self._where = config.url.rstrip("/")
    self._headers = {}
    if config.api_key is not None:
      self._headers["Authorization"] = f"Bearer {config.api_key}"
    self._http: aiohttp.ClientSession | None = None
    self._max_context = 0  # 0: not connected
    self._version = 0
    self._running: dict[str, asyncio.Task] = {}
    self._abandoning: set[asyncio.Task] = set()
    self._counts = {"requests": 0, "sampled_tokens": 0, "retries": 0}

  @property
  def max_context(self) -> int:
    """See `engine.api.Engine.max_context`; 0 before `connect`."""
    return self._max_context

  async def connect(self, seconds: float | None = None) -> None:
    """Waits for the server and learns what it is.

    Args:
      seconds: to wait; None: the configuration's `patience`.

    Raises:
      EngineUnavailableError: it is not there in time.
      EngineError: it is no such server.
    """
    seconds = self._config.patience if seconds is None else seconds
    deadline = time.monotonic() + seconds
    while True:
      try:
        return await self._learn()
      except errors.EngineError as error:
        away = isinstance(error, errors.EngineUnavailableError)
        if not away or time.monotonic() > deadline:
          await self.aclose()
          raise
      await asyncio.sleep(PAUSE)

  async def aclose(self) -> None:
    """Closes the connections; requests in flight are aborted."""
    for task in self._running.values():
      task.cancel()
    await asyncio.gather(*self._running.values(), return_exceptions=True)
    await asyncio.gather(*self._abandoning)
    if self._http is not None:
      await self._http.close()
      self._http = None

  async def generate(
    self, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    """See `engine.api.Engine.generate`."""
    if not self._max_context:
      raise errors.EngineUnavailableError(f"{self._where}: not connected")
    if len(request.prompt_ids) >= self._max_context:
      raise errors.ContextOverflowError(
        f"the prompt has {len(request.prompt_ids)} tokens; the context holds "
        f"{self._max_context}, prompt and response together"
      )
    self._check(request)
    if request.id in self._running:
      raise errors.EngineError(f"request id {request.id} is already in flight")
    self._counts["requests"] += 1
    arrived = streams.Stream()
    task = asyncio.create_task(self._fetch(request, arrived))
    self._running[request.id] = task
    try:
      stop_reason = None
      while stop_reason is None:
        chunk = await arrived.take()
        self._counts["sampled_tokens"] += len(chunk.token_ids)
        stop_reason = chunk.stop_reason
        yield chunk
    finally:
      del self._running[request.id]
      task.cancel()
      await asyncio.gather(task, return_exceptions=True)

  def abort(self, request_id: str) -> None:
    """See `engine.api.Engine.abort`; an unknown id is ignored."""
    if task := self._running.get(request_id):
      task.cancel()

  def stats(self) -> dict[str, float]:
    """What this client has seen; the server has /metrics of its own."""
    return {
      **self._counts,
      "running": len(self._running),
      "version": self._version,
    }

  @abc.abstractmethod
  async def _learn(self) -> None:
    """Sets what a server tells of itself, `_max_context` at least."""

  @abc.abstractmethod
  def _check(self, request: api.GenerateRequest) -> None:
    """Raises EngineError for what the server cannot do."""

  @abc.abstractmethod
  def _chunks(
    self, request: api.GenerateRequest, rid: str
  ) -> AsyncIterator[api.TokenChunk]:
    """The chunks of one attempt at a request, under a name of its own."""

  async def _abandon(self, rid: str) -> None:
    """Tells the server that nobody waits for an attempt any more.

    To be overridden where a server can be told.
    """
    del rid

  async def _fetch(
    self, request: api.GenerateRequest, arrived: streams.Stream
  ) -> None:
    """Puts a completion's chunks, or what became of it, into a stream."""
    deadline = time.monotonic() + self._config.patience
    begun = False
    while True:
      # A server that still runs an earlier attempt, or another client's
      # request, must not mistake this one.
      rid = f"{request.id}-{secrets.token_hex(4)}"
      try:
        async for chunk in self._attempt(request, rid):
          begun = True
          arrived.put(chunk)
        return
      except asyncio.CancelledError:
        arrived.put(api.TokenChunk((), (), (), types.StopReason.ABORT))
        task = asyncio.create_task(self._abandon(rid))
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)
        raise
      except errors.EngineUnavailableError as error:
        if begun or time.monotonic() > deadline:
          arrived.put(error)
          return
        self._counts["retries"] += 1
        _log.warning("request %s is sent again: %s", request.id, error)
        await asyncio.sleep(PAUSE)
      except Exception as error:  # raised again by whoever reads
        arrived.put(error)
        return

  async def _attempt(
    self, request: api.GenerateRequest, rid: str
  ) -> AsyncIterator[api.TokenChunk]:
    """The chunks of one attempt, the last with its stop reason."""
    last = None
    try:
      async with contextlib.aclosing(self._chunks(request, rid)) as chunks:
        async for chunk in chunks:
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

  async def _get(self, path: str) -> Any:
    """The JSON that a route answers with."""
    with self._reaching(path):
      async with self._session().get(path) as response:
        return await self._json(response)

  async def _json(self, response: aiohttp.ClientResponse) -> Any:
    """The JSON of a good reply; a bad one's error is raised."""
    data = await response.read()
    if response.status == 200:
      return json.loads(data)
    try:
      value = json.loads(data)
    except ValueError:
      value = data.decode(errors="replace").strip() or response.reason
    raise generate_reply.failure(self._where, value, response.status)

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
  def _reaching(self, path: str) -> Iterator[None]:
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


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
  """The JSON of server-sent events, each on one line, up to "[DONE]"."""
  held = b""
  async for data in response.content.iter_any():
    *lines, held = (held + data).split(b"\n")
    for line in lines:
      if line.startswith(b"data:"):
        text = line.removeprefix(b"data:").strip()
        if text == b"[DONE]":
          return
        yield json.loads(text)
