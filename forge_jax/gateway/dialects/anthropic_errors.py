"""Failed requests in the shape of Anthropic's protocol."""

from typing import Any

from forge_jax import errors
from forge_jax.gateway import refusal

_KINDS = {  # by status; any other 4xx is an invalid request
  401: "authentication_error",
  403: "permission_error",
  404: "not_found_error",
  413: "request_too_large",
  429: "rate_limit_error",
}


def error(failure: BaseException) -> tuple[int, dict[str, Any]]:
  """The HTTP status and the JSON of a failed request."""
  status, message = 500, "the server failed; its log says why"
  details = {}
  if isinstance(failure, refusal.Refusal):
    status, message = failure.status, str(failure)
    if failure.code is not None:
      details = {"details": {"error_code": failure.code}}
  elif isinstance(failure, errors.ContextOverflowError):
    # Agents know by these first words that they have to compact.
    status, message = 400, f"prompt is too long: {failure}"
  elif isinstance(failure, errors.ForgeError):
    message = str(failure)
  kind = "api_error"
  if status < 500:
    kind = _KINDS.get(status, "invalid_request_error")
  said = {"type": kind, "message": message, **details}
  return status, {"type": "error", "error": said}
