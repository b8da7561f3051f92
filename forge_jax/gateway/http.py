"""Reading requests, and giving every failure its status and its JSON."""

from collections.abc import Awaitable, Callable, Mapping
import logging
import math
from typing import Any

from aiohttp import web
import orjson

from forge_jax import errors
from forge_jax.gateway import refusal

_log = logging.getLogger(__name__)


def _without_traceback(record: logging.LogRecord) -> bool:
  record.exc_info = record.exc_text = None
  return True


# What the HTTP server itself says of connections. Why a request could not be
# parsed is told its sender, not the log: it quotes headers, keys among them.
connections_log = logging.getLogger(f"{__name__}.connections")
connections_log.addFilter(_without_traceback)

# The HTTP status and the JSON of a failed request, in a protocol's shape.
ErrorShape = Callable[[BaseException], tuple[int, Mapping[str, Any]]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def read_json(request: web.Request) -> Any:
  """The JSON of a request's body.

  Raises:
    Refusal: it is not JSON, or holds what is no text, or is not encoded as its
      headers say.
  """
  try:
    body = await request.read()
  except web.RequestPayloadError as error:
    raise refusal.Refusal(f"the body cannot be read: {error}") from error
  try:
    return orjson.loads(body)  # which takes text in UTF-8 only
  except orjson.JSONDecodeError as error:
    raise refusal.Refusal(f"the body is not JSON: {error}") from error


def bearer(request: web.Request) -> str:
  """The key of the Authorization header; empty if there is none."""
  scheme, _, token = request.headers.get("Authorization", "").partition(" ")
  return token.strip() if scheme.lower() == "bearer" else ""


def api_key(request: web.Request) -> str:
  """The session key that a request bears; empty if there is none.

  OpenAI's clients send `Authorization: Bearer`, Anthropic's `x-api-key` or
  either.
  """
  return bearer(request) or request.headers.get("x-api-key", "").strip()


def answers_middleware(
  shape_of: Callable[[web.Request], ErrorShape],
  answered: Callable[[str, int], None],
) -> Any:
  """A middleware that is the boundary of every request.

  Args:
    shape_of: gives the shape of a request's errors.
    answered: told of each answer's route and status.
  """

  @web.middleware
  async def answer(
    request: web.Request, handler: Handler
  ) -> web.StreamResponse:
    failure: Exception
    try:
      response = await handler(request)
      answered(_route(request), response.status)
      return response
    except web.HTTPException as error:
      failure = refusal.Refusal(error.reason, status=error.status)
    except ConnectionResetError:
      raise
    except errors.EngineUnavailableError as error:
      failure = refusal.Refusal(
        str(error), status=503, code="engine_unavailable", retry_after=1.0
      )
    except RecursionError:
      failure = refusal.Refusal("the body is nested too deeply")
    except Exception as error:  # the boundary of a request
      failure = error
    return _failed(request, failure, shape_of(request), answered)

  return answer


def _failed(
  request: web.Request,
  failure: Exception,
  shape: ErrorShape,
  answered: Callable[[str, int], None],
) -> web.Response:
  status, body = shape(failure)
  if status == 500:
    _log.error(
      "%s %s failed", request.method, _route(request), exc_info=failure
    )
  headers = {}
  if isinstance(failure, refusal.Refusal) and failure.retry_after is not None:
    headers["Retry-After"] = str(math.ceil(failure.retry_after))
  answered(_route(request), status)
  return web.json_response(body, status=status, headers=headers)


def _route(request: web.Request) -> str:
  """The route without the key that a URL may hold."""
  resource = request.match_info.route.resource
  return resource.canonical if resource else "unknown"
