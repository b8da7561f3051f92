"""Answers SGLang's `/generate`: one completion or several, whole or streamed."""

import asyncio
from collections.abc import AsyncIterator
import contextlib
import logging
import time
from typing import Any

from aiohttp import web

from forge_jax import errors
from forge_jax.engine import (
  api,
  generate_reply,
  generate_request,
  server_http,
  server_meters,
)

_log = logging.getLogger(__name__)


class Completions:
  """The completions that one server runs on its engine."""

  def __init__(
    self,
    engine: api.Engine,
    meters: server_meters.ServerMeters,
    eos_token_ids: tuple[int, ...],
  ):
    """Runs on `engine`; what is in `eos_token_ids` ends a reply."""
    self._engine = engine
    self._meters = meters
    self._eos = eos_token_ids
    self.running: set[str] = set()  # the ids of requests in flight
    self.closed = False  # whether further requests are refused

  def abort_all(self) -> None:
    """Ends every request early."""
    for rid in list(self.running):
      self._engine.abort(rid)

  async def answer(self, request: web.Request) -> web.StreamResponse:
    """Answers a `/generate` request."""
    if self.closed:
      raise errors.EngineUnavailableError("the server is shutting down")
    asked = generate_request.parse_generate(
      await server_http.read_json(request), self._engine.max_context, self._eos
    )
    if asked.stream:
      return await self._stream(request, asked)
    tasks = [
      asyncio.create_task(self.whole(one, asked)) for one in asked.requests
    ]
    try:
      replies = await asyncio.gather(*tasks)
    finally:
      await _cancel(tasks)
    return web.json_response(replies[0] if asked.single else replies)

  async def whole(
    self, request: api.GenerateRequest, asked: generate_request.Generate
  ) -> dict[str, Any]:
    """The reply to one request, once it is complete."""
    started = time.monotonic()
    ids, logprobs, versions, reason = [], [], [], None
    async with contextlib.aclosing(self._chunks(request)) as chunks:
      async for chunk in chunks:
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        versions += chunk.versions
        reason = chunk.stop_reason
    all_of_it = api.TokenChunk(
      tuple(ids), tuple(logprobs), tuple(versions), reason
    )
    reply = self._reply(request, all_of_it, len(ids), asked)
    reply["meta_info"]["e2e_latency"] = time.monotonic() - started
    return reply

  async def _stream(
    self, request: web.Request, asked: generate_request.Generate
  ) -> web.StreamResponse:
    response = web.StreamResponse(
      headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    async with contextlib.aclosing(self._parts(asked)) as parts:
      # A request refused before its first token gets a status of its own.
      first = await anext(parts)
      await response.prepare(request)
      await response.write(server_http.event(first))
      try:
        async for part in parts:
          await response.write(server_http.event(part))
      except ConnectionResetError:
        raise
      except Exception as error:  # the boundary of a request that has begun
        if not isinstance(error, errors.ForgeError):
          _log.exception("a streamed request failed")
        await response.write(server_http.event(server_http.described(error)[1]))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response

  async def _parts(
    self, asked: generate_request.Generate
  ) -> AsyncIterator[dict[str, Any]]:
    """The parts of all replies as they come."""
    # Where the client is behind, the engine's stream joins what is sampled.
    arrived: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(
      len(asked.requests)
    )

    async def sample(number: int) -> None:
      request, count, end = asked.requests[number], 0, None
      try:
        async for chunk in self._chunks(request):
          count += len(chunk.token_ids)
          part = self._reply(request, chunk, count, asked)
          if not asked.single:
            part["index"] = number
          await arrived.put(part)
      except Exception as error:  # raised again by whoever reads
        end = error
      await arrived.put(end)

    running = len(asked.requests)
    tasks = [asyncio.create_task(sample(n)) for n in range(running)]
    try:
      while running:
        part = await arrived.get()
        if isinstance(part, Exception):
          raise part
        if part is None:
          running -= 1
        else:
          yield part
    finally:
      await _cancel(tasks)

  async def _chunks(
    self, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    if request.id in self.running:
      raise errors.EngineError(f"rid {request.id!r} is in flight already")
    self.running.add(request.id)
    try:
      with self._meters.generating() as generating:
        chunks = self._engine.generate(request)
        async with contextlib.aclosing(chunks):
          async for chunk in chunks:
            generating.sampled(chunk)
            yield chunk
    finally:
      self.running.discard(request.id)

  def _reply(
    self,
    request: api.GenerateRequest,
    chunk: api.TokenChunk,
    count: int,
    asked: generate_request.Generate,
  ) -> dict[str, Any]:
    return generate_reply.reply(
      request,
      chunk,
      count,
      logprobs=asked.logprobs,
      version=int(self._engine.stats()["version"]),
    )


async def _cancel(tasks: list[asyncio.Task]) -> None:
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)
