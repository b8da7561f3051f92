"""The gateway: an HTTP server between agents and a rollout engine.

Agents speak a completion protocol and never hear of tokens; what was sampled is
recorded in the session that their key names.

  POST /v1/chat/completions   OpenAI Chat Completions
  POST /v1/completions        OpenAI's legacy Completions
  POST /v1/responses          OpenAI Responses; its other routes are in
                              `response_routes`
  POST /v1/messages           Anthropic Messages; also .../count_tokens
  GET  /v1/models, /v1/models/<name>
  GET  /, /health             these need no key
  GET  /metrics               Prometheus' text format, under the admin token
  /admin/..., /sessions/...   see `admin`

A session is named by its key: in the Authorization header, or in the URL, every
route of /v1 being served under /s/<key>/v1 too.

Invariants:
  1. A request is served only under the key of an open session; admin routes
     only under the admin token. Neither is ever logged.
  2. A client that goes away aborts its request. Closing a session aborts what
     is in flight, waits for it, and returns everything that was recorded.
  3. At most `max_running` completion requests run; as many as `max_waiting`, of
     `max_waiting_bytes` at most, wait, sessions in turn; more are refused with
     429 and the time to wait.
  4. A refused or failed request changes nothing in the session's forest, but
     that tokens sampled before a failure are kept.
  5. With a journal, what a client is told is on the disk before: a session that
     it opened, a completion whose end it sees, a reward. The next gateway of
     that journal opens the sessions again, with their keys and forests.
"""

import asyncio
from collections.abc import Mapping
import dataclasses
import errno
import functools
import secrets
import ssl
import time
from typing import Any

from aiohttp import web
import transformers

from forge_jax import errors
from forge_jax.engine import api
from forge_jax.gateway import (
  admin,
  admission,
  http,
  journal,
  meters,
  refusal,
  render,
  response_routes,
  serving,
  session_table,
  sessions,
)
from forge_jax.gateway.dialects import (
  anthropic_messages,
  base,
  openai_chat,
  openai_completions,
  openai_responses,
)

_POLL = 0.05  # seconds between looks at whether every session is closed
_LOOK = 60.0  # seconds between looks for sessions that are idle, at most
DIALECTS: tuple[base.Dialect, ...] = (
  openai_chat,
  openai_completions,
  openai_responses,
  anthropic_messages,
)
_BY_PATH = {dialect.PATH: dialect for dialect in DIALECTS}
_BY_PATH[anthropic_messages.COUNT_PATH] = anthropic_messages


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayConfig:
  """Configures the gateway."""

  host: str = "127.0.0.1"
  port: int = 0  # 0: any free port
  model_name: str = "policy"  # what GET /v1/models lists
  renderer: str = "auto"  # see render.Renderer
  template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  keep_reasoning: bool = False  # of past turns, where the template drops it
  # None: a random one.
  admin_token: str | None = dataclasses.field(default=None, repr=False)
  journal: str | None = None  # folder; None: sessions end with the process
  # A session is closed when nothing was asked of it for so long; 0: never.
  idle_seconds: float = 86_400.0
  max_body_bytes: int = 64 * 2**20
  max_running: int = 1024  # completion requests at a time
  max_waiting: int = 4096  # behind them
  max_waiting_bytes: int = 512 * 2**20  # of the bodies of those that wait
  tls_cert: str | None = None  # PEM file of a certificate chain
  tls_key: str | None = None  # PEM file of its key

  def __post_init__(self):
    if (self.tls_cert is None) != (self.tls_key is None):
      raise errors.ConfigError(
        "gateway.tls_cert and gateway.tls_key go together; one is missing"
      )
    if self.max_running < 1 or self.max_waiting < 0:
      raise errors.ConfigError(
        f"gateway.max_running={self.max_running} must be positive and "
        f"gateway.max_waiting={self.max_waiting} at least 0"
      )
    if not self.idle_seconds >= 0:
      raise errors.ConfigError(
        f"gateway.idle_seconds={self.idle_seconds} must be at least 0"
      )
    if self.max_waiting_bytes < self.max_body_bytes:
      raise errors.ConfigError(
        f"gateway.max_waiting_bytes={self.max_waiting_bytes} is less than "
        f"gateway.max_body_bytes={self.max_body_bytes}: a request of that size "
        "could not wait"
      )


class Gateway:
  """Serves agents in front of one engine; lives on one asyncio loop."""

  def __init__(
    self,
    engine: api.Engine,
    tokenizer: transformers.PreTrainedTokenizerFast,
    config: GatewayConfig | None = None,
  ):
    """Prepares a gateway; nothing is served until `start`.

    Raises:
      ConfigError: the renderer does not exist or does not fit the tokenizer;
        the certificate cannot be used.
    """
    self._config = config = config or GatewayConfig()
    self._engine = engine
    self.renderer = render.Renderer(
      tokenizer,
      config.renderer,
      config.template_kwargs,
      config.keep_reasoning,
    )
    self.admin_token = config.admin_token or secrets.token_urlsafe(24)
    self._journal: journal.Log = (
      journal.NoJournal()
      if config.journal is None
      else journal.Journal(config.journal)
    )
    self._table = session_table.SessionTable(engine, self._journal)
    gate = admission.Admission(
      config.max_running, config.max_waiting, config.max_waiting_bytes
    )
    self._meters = meters.Meters(self._table, gate)
    self._service = serving.Service(
      engine, self.renderer, gate, self._meters, self._journal
    )
    self._tls = _tls_context(config)
    self._runner: web.AppRunner | None = None
    self._idle: asyncio.Task[None] | None = None  # closes idle sessions
    self._port = config.port

  @property
  def url(self) -> str:
    """Where the gateway listens, such as http://127.0.0.1:8080."""
    scheme = "http" if self._tls is None else "https"
    return f"{scheme}://{self._config.host}:{self._port}"

  async def start(self) -> None:
    """Opens the sessions that the journal holds, and starts listening.

    Raises:
      GatewayError: the port is in use or the address cannot be bound; the
        journal is damaged.
      ConfigError: the journal cannot be kept, or belongs to another gateway.
    """
    try:
      self._table.restore(self._journal.read())
    except errors.ForgeError:
      await self._journal.aclose()
      raise
    runner = web.AppRunner(
      self._app(),
      access_log=None,
      handler_cancellation=True,
      logger=http.connections_log,
    )
    await runner.setup()
    host, port = self._config.host, self._config.port
    try:
      await web.TCPSite(
        runner, host, port, backlog=1024, ssl_context=self._tls
      ).start()
    except OSError as error:
      await runner.cleanup()
      await self._journal.aclose()
      why = "is in use" if error.errno == errno.EADDRINUSE else str(error)
      raise errors.GatewayError(
        f"the gateway cannot listen on {host}:{port}: {why}"
      ) from error
    self._runner = runner
    self._port = runner.addresses[0][1]
    if self._config.idle_seconds:
      self._idle = asyncio.create_task(self._close_idle())

  async def drain(self, seconds: float) -> None:
    """Opens no further session, and waits until the open ones are closed.

    Their agents go on meanwhile; after `seconds` it gives up.
    """
    self._table.draining = True
    deadline = time.monotonic() + seconds
    while len(self._table) and time.monotonic() < deadline:
      await asyncio.sleep(_POLL)

  async def stop(self) -> None:
    """Aborts what is in flight and stops listening.

    Sessions in a journal are open again when the next gateway starts.
    """
    if self._idle is not None:
      self._idle.cancel()
    await self._table.abort_all()
    if self._runner is not None:
      await self._runner.cleanup()
      self._runner = None
    await self._journal.aclose()

  async def _close_idle(self) -> None:
    seconds = self._config.idle_seconds
    while True:
      await asyncio.sleep(min(seconds / 4, _LOOK))
      await self._table.close_idle(seconds)

  def _app(self) -> web.Application:
    app = web.Application(
      client_max_size=self._config.max_body_bytes,
      middlewares=[
        http.answers_middleware(_error_shape, self._meters.answered)
      ],
    )
    self._admin = admin.AdminRoutes(
      self._table, self._journal, self.admin_token
    )
    app.add_routes(self._admin.routes())
    for path in ("/", "/health"):  # agents probe `HEAD /`
      app.add_routes([web.get(path, self._health)])
    app.add_routes([web.get("/metrics", self._metrics)])
    stored = response_routes.ResponseRoutes(
      self._session_of, self.renderer, self._journal
    )
    for prefix in ("/v1", "/s/{key}/v1"):
      app.add_routes([web.get(prefix + "/models", self._models)])
      app.add_routes([web.get(prefix + "/models/{name:.+}", self._model)])
      app.add_routes(stored.routes(prefix))
      for dialect in DIALECTS:
        handler = functools.partial(self._complete, dialect)
        app.add_routes([web.post(prefix + dialect.PATH, handler)])
      app.add_routes(
        [web.post(prefix + anthropic_messages.COUNT_PATH, self._count_tokens)]
      )
    return app

  async def _complete(
    self, dialect: base.Dialect, request: web.Request
  ) -> web.StreamResponse:
    session = self._session_of(request)
    return await self._service.complete(dialect, request, session)

  async def _count_tokens(self, request: web.Request) -> web.Response:
    self._session_of(request)
    body = await http.read_json(request)
    count = anthropic_messages.count_tokens(body, self.renderer)
    return web.json_response(count)

  async def _models(self, request: web.Request) -> web.Response:
    """The list of models, as the clients of OpenAI and of Anthropic read it."""
    self._session_of(request)
    model = self._described()
    ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
    return web.json_response({"object": "list", "data": [model], **ends})

  async def _model(self, request: web.Request) -> web.Response:
    self._session_of(request)
    name = request.match_info["name"]
    if name != self._config.model_name:
      raise refusal.Refusal(
        f"model: there is {self._config.model_name!r} only, not {name!r:.80}",
        status=404,
        param="model",
        code="model_not_found",
      )
    return web.json_response(self._described())

  def _described(self) -> dict[str, Any]:
    """The model, with the fields of both protocols."""
    return {
      "id": self._config.model_name,
      "object": "model",
      "created": 0,
      "owned_by": "forge-jax",
      "type": "model",
      "display_name": self._config.model_name,
      "created_at": "1970-01-01T00:00:00Z",  # Anthropic's word for unknown
      "lifecycle": "active",
      "max_input_tokens": self._engine.max_context,
    }

  async def _health(self, request: web.Request) -> web.Response:
    if self._table.draining:
      return web.json_response({"status": "draining"}, status=503)
    return web.json_response({"status": "ok"})

  async def _metrics(self, request: web.Request) -> web.Response:
    self._admin.check(request)
    return web.Response(
      body=self._meters.text(), headers={"Content-Type": meters.CONTENT_TYPE}
    )

  def _session_of(self, request: web.Request) -> sessions.Session:
    """The session whose key the URL or a header holds."""
    key = request.match_info.get("key") or http.api_key(request)
    return self._table.by_key(key)


def _tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
  if config.tls_cert is None:
    return None
  context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
  try:
    context.load_cert_chain(config.tls_cert, config.tls_key)
  except OSError as error:  # SSLError is one
    raise errors.ConfigError(
      f"gateway.tls_cert={config.tls_cert!r} and gateway.tls_key="
      f"{config.tls_key!r} are no certificate and its key: {error}"
    ) from error
  return context


def _error_shape(request: web.Request) -> http.ErrorShape:
  """The errors of the protocol whose route it is; else OpenAI's."""
  path = "/" + request.path.rpartition("/v1/")[2]
  return _BY_PATH.get(path, openai_chat).error
