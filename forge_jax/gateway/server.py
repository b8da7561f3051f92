"""The gateway: an HTTP server between agents and a rollout engine.

Agents speak a completion protocol and never hear of tokens; what was sampled is
recorded in the session that their key names.

  POST /v1/chat/completions          session by Authorization: Bearer <key>
  POST /s/<key>/v1/chat/completions  session by URL
  GET  /v1/models, GET /health
  POST /admin/sessions               {id, seed, sampling} -> {id, api_key}
  GET  /admin/sessions/<id>          counts
  GET  /admin/sessions/<id>/forest   the captured forest so far
  POST /admin/sessions/<id>/rewards  {rewards: [...]}
  POST /admin/sessions/<id>/close    -> {completions: [...], rewards: [...]}

Invariants:
  1. A request is served only under the key of an open session; admin routes
     only under the admin token. Keys are looked up by digest and the token
     compared in constant time; neither is ever logged.
  2. A client that goes away aborts its request. Closing a session aborts what
     is in flight, waits for it, and returns everything that was recorded.
  3. A refused or failed request changes nothing in the session's forest, but
     that tokens sampled before a failure are kept.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
import contextlib
import dataclasses
import errno
import hashlib
import hmac
import json
import logging
import re
import secrets
from typing import Any

from aiohttp import web
import transformers

from forge_jax import errors
from forge_jax.engine import api
from forge_jax.gateway import generation, refusal, render, sessions, wire
from forge_jax.gateway.dialects import openai_chat

_log = logging.getLogger(__name__)
_SAMPLING = {  # name -> (type, lowest, highest)
  "temperature": (float, 0.0, 2.0),
  "top_p": (float, 0.0, 1.0),
  "top_k": (int, 0, 2**31 - 1),
}


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayConfig:
  """Configures the gateway."""

  host: str = "127.0.0.1"
  port: int = 0  # 0: any free port
  model_name: str = "policy"  # what GET /v1/models lists
  renderer: str = "auto"  # see render.Renderer
  template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  admin_token: str | None = None  # None: a random one
  max_body_bytes: int = 64 * 2**20


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
      ConfigError: the renderer does not exist or does not fit the tokenizer.
    """
    self._config = config = config or GatewayConfig()
    self._engine = engine
    self.renderer = render.Renderer(
      tokenizer, config.renderer, config.template_kwargs
    )
    self.admin_token = config.admin_token or secrets.token_urlsafe(24)
    self._sessions: dict[str, sessions.Session] = {}
    self._keys: dict[bytes, sessions.Session] = {}
    self._key_of: dict[str, bytes] = {}
    self._runner: web.AppRunner | None = None
    self._port = config.port

  @property
  def url(self) -> str:
    """Where the gateway listens, such as http://127.0.0.1:8080."""
    return f"http://{self._config.host}:{self._port}"

  async def start(self) -> None:
    """Starts listening.

    Raises:
      GatewayError: the port is in use or the address cannot be bound.
    """
    runner = web.AppRunner(
      self._app(), access_log=None, handler_cancellation=True
    )
    await runner.setup()
    host, port = self._config.host, self._config.port
    try:
      await web.TCPSite(runner, host, port, backlog=1024).start()
    except OSError as error:
      await runner.cleanup()
      why = "is in use" if error.errno == errno.EADDRINUSE else str(error)
      raise errors.GatewayError(
        f"the gateway cannot listen on {host}:{port}: {why}"
      ) from error
    self._runner = runner
    self._port = runner.addresses[0][1]

  async def stop(self) -> None:
    """Closes every session and stops listening."""
    for session in list(self._sessions.values()):
      await self._shut(session)
    if self._runner is not None:
      await self._runner.cleanup()
      self._runner = None

  def _app(self) -> web.Application:
    app = web.Application(
      client_max_size=self._config.max_body_bytes, middlewares=[_errors]
    )
    admin = "/admin/sessions"
    app.add_routes(
      [
        web.post("/v1/chat/completions", self._chat),
        web.post("/s/{key}/v1/chat/completions", self._chat),
        web.get("/v1/models", self._models),
        web.get("/s/{key}/v1/models", self._models),
        web.get("/health", self._health),
        web.post(admin, self._open),
        web.get(admin + "/{id}", self._summary),
        web.get(admin + "/{id}/forest", self._forest),
        web.post(admin + "/{id}/rewards", self._rewards),
        web.post(admin + "/{id}/close", self._close),
      ]
    )
    return app

  async def _chat(self, request: web.Request) -> web.StreamResponse:
    session = self._session_of(request)
    asked = openai_chat.parse(await _json(request))
    async with generation.Generation(
      self._engine, self.renderer, session, asked.turn
    ) as generated:
      if asked.stream:
        return await self._stream(request, asked, generated)
      async for _ in generated.deltas(incremental=False):
        pass
      return web.Response(
        text=openai_chat.completion(asked, generated, self.renderer),
        content_type="application/json",
      )

  async def _stream(
    self,
    request: web.Request,
    asked: openai_chat.ChatRequest,
    generated: generation.Generation,
  ) -> web.StreamResponse:
    response = web.StreamResponse(
      headers={
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
      }
    )
    writer = openai_chat.ChatStream(asked, generated, self.renderer)
    deltas = generated.deltas(incremental=True)
    # A request refused before its first token gets a status of its own.
    first = await anext(deltas)
    await response.prepare(request)
    try:
      async for delta in _chain(first, deltas):
        if event := writer.delta(delta):
          await response.write(event.encode())
      await response.write(writer.end().encode())
    except ConnectionResetError:
      raise
    except Exception as error:  # the boundary of a request that has begun
      if not isinstance(error, errors.ForgeError):
        _log.exception("a streamed request failed")
      await response.write(openai_chat.encode_error(error).encode())
    await response.write_eof()
    return response

  async def _models(self, request: web.Request) -> web.Response:
    self._session_of(request)
    model = {
      "id": self._config.model_name,
      "object": "model",
      "created": 0,
      "owned_by": "forge-jax",
    }
    return web.json_response({"object": "list", "data": [model]})

  async def _health(self, request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})

  async def _open(self, request: web.Request) -> web.Response:
    self._check_admin(request)
    id, seed, sampling = _opening(await _json(request))
    if id in self._sessions:
      raise refusal.Refusal(f"session {id!r} is open already", status=409)
    session = sessions.Session(id, seed, sampling)
    name = re.sub(r"[^A-Za-z0-9_.]", "_", id)
    api_key = f"forge-{name}-{secrets.token_urlsafe(24)}"
    self._sessions[id] = session
    self._key_of[id] = _key_digest(api_key)
    self._keys[self._key_of[id]] = session
    return web.json_response({"id": id, "api_key": api_key})

  async def _summary(self, request: web.Request) -> web.Response:
    return web.json_response(self._named_session(request).summary())

  async def _forest(self, request: web.Request) -> web.Response:
    session = self._named_session(request)
    return web.json_response({"id": session.id, "nodes": session.forest()})

  async def _rewards(self, request: web.Request) -> web.Response:
    session = self._named_session(request)
    body = await _json(request)
    rewards = body.get("rewards") if isinstance(body, dict) else None
    if not isinstance(rewards, list):
      raise refusal.Refusal("a list of rewards is required", param="rewards")
    try:
      parsed = [wire.reward_from_json(reward) for reward in rewards]
    except (ValueError, TypeError) as error:
      raise refusal.Refusal(str(error), param="rewards") from error
    session.rewards += parsed
    return web.json_response({"rewards": len(session.rewards)})

  async def _close(self, request: web.Request) -> web.Response:
    session = self._named_session(request)
    await self._shut(session)
    return web.json_response(
      {
        "completions": [
          wire.completion_to_json(c) for c in session.completions()
        ],
        "rewards": [wire.reward_to_json(r) for r in session.rewards],
      }
    )

  async def _shut(self, session: sessions.Session) -> None:
    """Takes a session's key away, aborts what it runs and waits for it."""
    session.closed = True
    del self._sessions[session.id]
    del self._keys[self._key_of.pop(session.id)]
    for request_id in session.running:
      self._engine.abort(request_id)
    await session.drain()

  def _session_of(self, request: web.Request) -> sessions.Session:
    """The session whose key the URL or the Authorization header holds."""
    key = request.match_info.get("key") or _bearer(request)
    session = self._keys.get(_key_digest(key))
    if session is None:
      raise refusal.Refusal(
        "the API key belongs to no open session",
        status=401,
        code="invalid_api_key",
      )
    return session

  def _named_session(self, request: web.Request) -> sessions.Session:
    """The session an admin route names."""
    self._check_admin(request)
    id = request.match_info["id"]
    if id not in self._sessions:
      raise refusal.Refusal(f"no session {id!r} is open", status=404)
    return self._sessions[id]

  def _check_admin(self, request: web.Request) -> None:
    given, token = _key_digest(_bearer(request)), _key_digest(self.admin_token)
    if not hmac.compare_digest(given, token):
      raise refusal.Refusal(
        "the admin token is missing or wrong",
        status=401,
        code="invalid_api_key",
      )


@web.middleware
async def _errors(
  request: web.Request,
  handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
  """Gives every failure its status and its JSON: a request's boundary."""
  try:
    return await handler(request)
  except web.HTTPException as error:
    failure: Exception = refusal.Refusal(error.reason, status=error.status)
  except ConnectionResetError:
    raise
  except RecursionError:
    failure = refusal.Refusal("the body is nested too deeply")
  except Exception as error:  # the boundary of a request
    failure = error
  status, body = openai_chat.error(failure)
  if status == 500:
    _log.error(
      "%s %s failed", request.method, _safe_path(request), exc_info=failure
    )
  return web.json_response(body, status=status)


async def _json(request: web.Request) -> Any:
  body = await request.read()
  try:
    value = json.loads(body)
    if b"\\ud" in body.lower():  # escapes can spell what is no text
      json.dumps(value, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    raise refusal.Refusal(f"the body is not JSON: {error}") from error
  return value


def _opening(body: Any) -> tuple[str, int, dict[str, float]]:
  """The id, the seed and the sampling defaults of a session to open."""
  if not isinstance(body, dict):
    raise refusal.Refusal("the body must be a JSON object")
  id, seed = body.get("id"), body.get("seed", 0)
  if not isinstance(id, str) or not 0 < len(id) <= 256:
    raise refusal.Refusal("id: must be 1 to 256 characters", param="id")
  if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
    raise refusal.Refusal("seed: must be an integer >= 0", param="seed")
  sampling = body.get("sampling") or {}
  if not isinstance(sampling, dict):
    raise refusal.Refusal("sampling: must be an object", param="sampling")
  for name, value in sampling.items():
    if name not in _SAMPLING:
      raise refusal.Refusal(
        f"sampling.{name}: known are {sorted(_SAMPLING)}",
        param=f"sampling.{name}",
      )
    kind, low, high = _SAMPLING[name]
    kinds = int if kind is int else int | float
    if (
      isinstance(value, bool)
      or not isinstance(value, kinds)
      or not low <= value <= high
    ):
      raise refusal.Refusal(
        f"sampling.{name}: must be from {low} to {high}, not {value!r}",
        param=f"sampling.{name}",
      )
  return id, seed, sampling


def _bearer(request: web.Request) -> str:
  scheme, _, token = request.headers.get("Authorization", "").partition(" ")
  return token.strip() if scheme.lower() == "bearer" else ""


def _key_digest(key: str) -> bytes:
  return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _safe_path(request: web.Request) -> str:
  """The route without the key that a URL may hold."""
  resource = request.match_info.route.resource
  return resource.canonical if resource else "an unknown path"


async def _chain(
  first: generation.Delta, rest: AsyncIterator[generation.Delta]
) -> AsyncIterator[generation.Delta]:
  yield first
  async with contextlib.aclosing(rest):
    async for delta in rest:
      yield delta
