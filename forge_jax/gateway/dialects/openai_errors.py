"""Failed requests in the shape of OpenAI's protocols."""

import json
from typing import Any

from forge_jax import errors
from forge_jax.gateway import refusal


def error(
  failure: BaseException, prompt: str = "messages"
) -> tuple[int, dict[str, Any]]:
  """The HTTP status and the JSON of a failed request.

  Args:
    failure: what was raised.
    prompt: the parameter that holds the protocol's prompt.
  """
  status, param, code = 500, None, None
  message = "the server failed; its log says why"
  if isinstance(failure, refusal.Refusal):
    status, param, code = failure.status, failure.param, failure.code
    message = str(failure)
  elif isinstance(failure, errors.ContextOverflowError):
    status, param, code = 400, prompt, "context_length_exceeded"
    message = str(failure)
  elif isinstance(failure, errors.ForgeError):
    message = str(failure)
  kind = {401: "authentication_error"}.get(status, "invalid_request_error")
  if status >= 500:
    kind = "server_error"
  return status, {
    "error": {"message": message, "type": kind, "param": param, "code": code}
  }


def error_event(failure: BaseException) -> str:
  """A failure as a server-sent event, for a stream that has begun."""
  return f"data: {json.dumps(error(failure)[1])}\n\n"
