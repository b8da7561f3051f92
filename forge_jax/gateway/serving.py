"""One request, from its JSON to its reply, in any dialect.

The choices of a request are sampled at the same time. A client that goes away
aborts them, and so does one that stops reading; what was sampled until then is
kept (see `generation`).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
import logging
import time

from aiohttp import web

from forge_jax import errors
from forge_jax.engine import api
from forge_jax.gateway import (
  admission,
  attempts,
  generation,
  http,
  journal,
  meters,
  render,
  sessions,
)
from forge_jax.gateway.dialects import base

_log = logging.getLogger(__name__)

_Deltas = AsyncIterator[tuple[int, generation.Delta]]
_STALL_SECONDS = 30.0  # a client that reads nothing for so long has gone
_MOST_UNSENT = 64  # deltas of several choices that wait to be sent


class Service:
  """Serves completion requests in front of one engine."""

  def __init__(
    self,
    engine: api.Engine,
    renderer: render.Renderer,
    gate: admission.Admission,
    figures: meters.Meters,
    log: journal.Log,
  ):
    """Serves what `gate` admits and counts it; `log` keeps what was sampled."""
    self._engine = engine
    self._renderer = renderer
    self._gate = gate
    self._figures = figures
    self._journal = log

  async def complete(
    self,
    dialect: base.Dialect,
    request: web.Request,
    session: sessions.Session,
  ) -> web.StreamResponse:
    """Serves a request of a session.

    Raises:
      ForgeError: it is refused, or fails before its first token.
    """
    # Before the body is read.
    self._gate.check(session.id, request.content_length or 0)
    self._journal.check()
    body = await http.read_json(request)
    asked = dialect.parse(body, session)
    raw = await request.read()
    attempt = session.attempts.begin(
      attempts.read(dialect.PATH, body["model"], raw, request.headers)
    )
    choices: list[generation.Generation] = []
    started, delivered = time.monotonic(), False
    try:
      async with (
        self._gate.permit(session.id, len(raw)),
        contextlib.AsyncExitStack() as s,
      ):
        for number, turn in enumerate(asked.turns):
          choice = generation.Generation(
            self._engine, self._renderer, session, turn, attempt, number
          )
          choices.append(await s.enter_async_context(choice))
        if asked.stream:
          events = asked.events(choices, self._renderer)
          response, delivered = await self._stream(request, choices, events)
          return response
        async with contextlib.aclosing(_deltas(choices, False)) as deltas:
          async for _ in deltas:
            pass
        text = asked.reply(choices, self._renderer)
        await self._journal.sync()
        delivered = request.transport is not None
        return web.Response(text=text, content_type="application/json")
    finally:
      session.end(attempt, delivered)
      seconds = time.monotonic() - started
      self._figures.completed(dialect.PATH, seconds, choices)

  async def _stream(
    self,
    request: web.Request,
    choices: Sequence[generation.Generation],
    events: base.Events,
  ) -> tuple[web.StreamResponse, bool]:
    """Streams a reply; returns the response, and whether it was sent whole."""
    whole = False
    response = web.StreamResponse(
      headers={
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
      }
    )
    async with contextlib.aclosing(_deltas(choices, True)) as deltas:
      # A request refused before its first token gets a status of its own.
      first = await anext(deltas)
      await response.prepare(request)
      try:
        if text := events.delta(*first):
          await _write(request, response, text)
        async for choice, delta in deltas:
          if text := events.delta(choice, delta):
            await _write(request, response, text)
        end = events.end()
        await self._journal.sync()  # what is acknowledged by the end is kept
        await _write(request, response, end)
        whole = True
      except ConnectionResetError:
        raise
      except Exception as error:  # the boundary of a request that has begun
        if not isinstance(error, errors.ForgeError):
          _log.exception("a streamed request failed")
        await _write(request, response, events.fail(error))
    await response.write_eof()
    return response, whole


async def _write(
  request: web.Request, response: web.StreamResponse, text: str
) -> None:
  """Sends a part of a stream."""
  try:
    async with asyncio.timeout(_STALL_SECONDS):
      await response.write(text.encode())
  except TimeoutError as error:
    if request.transport is not None:
      request.transport.abort()
    raise ConnectionResetError("the client has stopped reading") from error


async def _deltas(
  choices: Sequence[generation.Generation], incremental: bool
) -> _Deltas:
  """The deltas of all choices as they come, each with its choice's number."""
  if len(choices) == 1:
    async with contextlib.aclosing(choices[0].deltas(incremental)) as deltas:
      async for delta in deltas:
        yield 0, delta
    return
  arrived: asyncio.Queue[tuple[int, generation.Delta | Exception | None]] = (
    asyncio.Queue(_MOST_UNSENT)
  )

  async def sample(number: int) -> None:
    end = None
    try:
      async for delta in choices[number].deltas(incremental):
        await arrived.put((number, delta))
    except Exception as error:  # raised again by whoever reads
      end = error
    await arrived.put((number, end))

  tasks = [asyncio.create_task(sample(n)) for n in range(len(choices))]
  try:
    running = len(choices)
    while running:
      number, item = await arrived.get()
      if isinstance(item, Exception):
        raise item
      if item is None:
        running -= 1
      else:
        yield number, item
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
