"""A server in front of one engine, in SGLang's native HTTP API.

  POST /generate                  `generate_request`, `generate_reply`; a stream
                                  of server-sent events has only new tokens
  POST /abort_request             {rid} or {abort_all: true}
  POST /flush_cache
  POST /pause_generation          {mode: "abort" (default) or "in_place"}
  POST /continue_generation
  POST /update_weights_from_disk  {model_path, weight_version}
  GET  /get_server_info, /server_info, /get_model_info, /model_info,
       /get_weight_version, /get_load, /v1/models
  GET  /health, /health_generate, /metrics (Prometheus' text format)

Invariants:
  1. Nothing that a request holds, and no failure of the model, ends the server:
     every failure is an answer, JSON with a message and the error's type.
  2. A client that goes away aborts its requests.
  3. An update, a flush, a pause is answered once it has taken effect, or with
     an error in bounded time. Weights are read and checked beside the running
     requests; what is refused changes nothing.
  4. With a key, every route but the health checks wants it.
"""

import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import dataclasses
import errno
import hmac
import logging
import secrets
import time

from aiohttp import web

from forge_jax import errors, types
from forge_jax.engine import (
  api,
  server_completions,
  server_http,
  server_meters,
)

_log = logging.getLogger(__name__)
_OPEN = ("/health", "/health_generate")  # without a key


@dataclasses.dataclass(frozen=True, slots=True)
class EngineServerConfig:
  """Configures a server in front of an engine."""

  host: str = "127.0.0.1"
  port: int = 0  # 0: any free port
  model_name: str = "policy"  # what GET /v1/models lists
  api_key: str | None = None  # None: no key is needed
  max_body_bytes: int = 64 * 2**20
  settle_seconds: float = 60.0  # for a control to take effect between steps
  health_seconds: float = 20.0  # within which a healthy engine samples a token


class EngineServer:
  """Serves one engine; lives on one asyncio loop."""

  def __init__(
    self,
    engine: api.LocalEngine,
    config: EngineServerConfig | None = None,
    *,
    eos_token_ids: tuple[int, ...] = (),
  ):
    """Prepares a server of a started engine; `start` makes it listen.

    Args:
      engine: what samples.
      config: how to serve.
      eos_token_ids: the model's; they end a reply, as SGLang's do.
    """
    self._engine = engine
    self._config = config or EngineServerConfig()
    self._meters = server_meters.ServerMeters(engine)
    self._completions = server_completions.Completions(
      engine, self._meters, eos_token_ids
    )
    self._updating = asyncio.Lock()
    self._runner: web.AppRunner | None = None
    self._port = self._config.port

  @property
  def url(self) -> str:
    """Where the server listens, such as http://127.0.0.1:30000."""
    return f"http://{self._config.host}:{self._port}"

  async def start(self) -> None:
    """Starts listening.

    Raises:
      EngineError: the port is in use or the address cannot be bound.
    """
    app = web.Application(
      client_max_size=self._config.max_body_bytes, middlewares=[self._answer]
    )
    app.add_routes(self._routes())
    # Its log would hold a line a request.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    host, port = self._config.host, self._config.port
    try:
      await web.TCPSite(runner, host, port, backlog=1024).start()
    except OSError as error:
      await runner.cleanup()
      why = "is in use" if error.errno == errno.EADDRINUSE else str(error)
      raise errors.EngineError(
        f"the engine's server cannot listen on {host}:{port}: {why}"
      ) from error
    self._runner = runner
    self._port = runner.addresses[0][1]

  async def drain(self, seconds: float) -> None:
    """Refuses further requests, and waits for those that run, at most so long."""
    self._completions.closed = True
    deadline = time.monotonic() + seconds
    while self._completions.running and time.monotonic() < deadline:
      await asyncio.sleep(0.05)

  async def stop(self) -> None:
    """Aborts what runs and stops listening."""
    self._completions.closed = True
    self._completions.abort_all()
    if self._runner is not None:
      await self._runner.cleanup()
      self._runner = None

  def _routes(self) -> list[web.RouteDef]:
    def both(path: str, handler) -> list[web.RouteDef]:
      return [web.post(path, handler), web.get(path, handler)]

    return [
      web.post("/generate", self._completions.answer),
      web.post("/abort_request", self._abort_request),
      *both("/flush_cache", self._flush_cache),
      web.post("/pause_generation", self._pause),
      web.post("/continue_generation", self._continue),
      web.post("/update_weights_from_disk", self._update_weights),
      web.get("/get_server_info", self._server_info),
      web.get("/server_info", self._server_info),
      web.get("/get_model_info", self._model_info),
      web.get("/model_info", self._model_info),
      web.get("/get_weight_version", self._model_info),
      web.get("/get_load", self._server_info),
      web.get("/v1/models", self._models),
      web.get("/health", self._health),
      web.get("/health_generate", self._health_generate),
      web.get("/metrics", self._metrics),
    ]

  @web.middleware
  async def _answer(
    self,
    request: web.Request,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
  ) -> web.StreamResponse:
    """The boundary of every request."""
    resource = request.match_info.route.resource
    route = resource.canonical if resource else "unknown"
    try:
      if request.path not in _OPEN:
        self._check_key(request)
      response = await handler(request)
    except web.HTTPException as error:
      response = server_http.failed(
        errors.EngineError(error.reason), error.status
      )
    except ConnectionResetError:
      raise
    except Exception as error:  # the boundary of a request
      if not isinstance(error, errors.ForgeError):
        _log.exception("%s %s failed", request.method, route)
      response = server_http.failed(error)
    self._meters.answered(route, response.status)
    return response

  def _check_key(self, request: web.Request) -> None:
    key = self._config.api_key
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(
      given.encode(errors="surrogateescape"), key.encode()
    ):
      raise web.HTTPUnauthorized(reason="the API key is missing or wrong")

  async def _abort_request(self, request: web.Request) -> web.Response:
    body = await server_http.read_json(request)
    if body.get("abort_all") is True:
      self._completions.abort_all()
    elif isinstance(body.get("rid"), str):
      self._engine.abort(body["rid"])
    else:
      raise errors.EngineError(
        "abort_request: a rid, or abort_all, is required"
      )
    return web.Response()

  async def _flush_cache(self, request: web.Request) -> web.Response:
    await self._control(self._engine.flush_cache)
    return web.Response(text="Cache flushed.\n")

  async def _pause(self, request: web.Request) -> web.Response:
    mode = (await server_http.read_json(request)).get("mode", "abort")
    if mode not in ("abort", "in_place"):
      raise errors.EngineError(
        f"pause_generation: mode={mode!r:.80}; expected 'abort' or 'in_place'"
      )
    if mode == "abort":
      self._completions.abort_all()
    await self._control(self._engine.pause)
    return web.json_response({"status": "ok", "message": "paused"})

  async def _continue(self, request: web.Request) -> web.Response:
    await self._control(self._engine.resume)
    return web.json_response({"status": "ok", "message": "continued"})

  async def _update_weights(self, request: web.Request) -> web.Response:
    body = await server_http.read_json(request)
    path, version = body.get("model_path"), str(body.get("weight_version"))
    if not isinstance(path, str) or not version.isdigit():
      raise errors.EngineError(
        "update_weights_from_disk: model_path, a folder, and weight_version, "
        "a number, are required"
      )
    if body.get("abort_all_requests") is True:
      self._completions.abort_all()
    weights = types.WeightsVersion(int(version), path=path)
    async with self._updating:
      await self._control(lambda: self._engine.update_weights(weights))
    message = f"the weights are of version {version}"
    return web.json_response(
      {"success": True, "message": message, "num_paused_requests": 0}
    )

  async def _control(self, control: Callable[[], None]) -> None:
    """Calls the engine and waits until what was called for is in effect."""
    await asyncio.to_thread(control)
    await asyncio.to_thread(self._engine.settle, self._config.settle_seconds)

  async def _server_info(self, request: web.Request) -> web.Response:
    return web.json_response(
      {
        "context_length": self._engine.max_context,
        "weight_version": str(self._version),
        "incremental_streaming_output": True,
        # Whether log-probabilities are those of the distribution sampled from
        # also where top_k, top_p and the like cut it; SGLang's are not.
        "filtered_logprobs": True,
        "internal_states": [dict(self._engine.stats())],
      }
    )

  async def _model_info(self, request: web.Request) -> web.Response:
    return web.json_response(
      {
        "model_path": self._config.model_name,
        "is_generation": True,
        "weight_version": str(self._version),
      }
    )

  async def _models(self, request: web.Request) -> web.Response:
    model = {
      "id": self._config.model_name,
      "object": "model",
      "owned_by": "forge-jax",
      "max_model_len": self._engine.max_context,
    }
    return web.json_response({"object": "list", "data": [model]})

  async def _health(self, request: web.Request) -> web.Response:
    """Whether the engine answers between two steps."""
    limit = self._config.health_seconds
    await asyncio.to_thread(self._engine.settle, limit)
    return web.json_response({"status": "ok"})

  async def _health_generate(self, request: web.Request) -> web.Response:
    """Whether the engine samples a token."""
    sampling = api.SamplingParams(max_tokens=1, temperature=0.0)
    probe = api.GenerateRequest(
      f"health-{secrets.token_hex(8)}", (0,), sampling
    )
    limit = self._config.health_seconds
    try:
      async with asyncio.timeout(limit):
        async with contextlib.aclosing(self._engine.generate(probe)) as chunks:
          async for _ in chunks:
            pass
    except TimeoutError as error:
      raise errors.EngineUnavailableError(
        f"the engine sampled no token in {limit:g} s"
      ) from error
    return web.json_response({"status": "ok"})

  async def _metrics(self, request: web.Request) -> web.Response:
    return web.Response(
      body=self._meters.text(),
      headers={"Content-Type": server_meters.CONTENT_TYPE},
    )

  @property
  def _version(self) -> int:
    return int(self._engine.stats()["version"])
