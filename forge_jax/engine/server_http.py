"""JSON in, and every failure's JSON out, for the server of an engine."""

from collections.abc import Mapping
import json
from typing import Any

from aiohttp import web

from forge_jax import errors


async def read_json(request: web.Request) -> Mapping[str, Any]:
  """The JSON object of a request's body; an empty body is an empty one.

  Raises:
    EngineError: it is something else.
  """
  try:
    body = json.loads(await request.read() or b"{}")
  except (ValueError, RecursionError) as error:
    raise errors.EngineError(f"the body is not JSON: {error}") from error
  if not isinstance(body, Mapping):
    raise errors.EngineError("the body must be a JSON object")
  return body


def described(failure: Exception) -> tuple[int, dict[str, Any]]:
  """The status and the JSON of a failure."""
  status, message = 500, "the server failed; its log says why"
  if isinstance(failure, errors.ForgeError):
    unavailable = isinstance(failure, errors.EngineUnavailableError)
    status, message = 503 if unavailable else 400, str(failure)
  kind = type(failure).__name__ if status != 500 else "InternalError"
  return status, {"error": {"message": message, "type": kind, "code": status}}


def failed(failure: Exception, status: int | None = None) -> web.Response:
  """The answer that tells of a failure."""
  usual, body = described(failure)
  body["error"]["code"] = status or usual
  # As SGLang says of controls, beside the error.
  body |= {"success": False, "message": body["error"]["message"]}
  return web.json_response(body, status=status or usual)


def event(value: Mapping[str, Any]) -> bytes:
  """A server-sent event."""
  return f"data: {json.dumps(value)}\n\n".encode()
