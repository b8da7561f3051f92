"""A request that is refused, with what a client needs to know of it."""

from forge_jax import errors


class Refusal(errors.GatewayError):
  """A 4xx or 503 answer; a dialect gives it its protocol's shape."""

  def __init__(
    self,
    message: str,
    *,
    status: int = 400,
    param: str | None = None,
    code: str | None = None,
    retry_after: float | None = None,
  ):
    """Holds what a client needs to know.

    Args:
      message: what was wrong, where, and what was expected.
      status: the HTTP status.
      param: the offending parameter.
      code: a word for programs.
      retry_after: seconds after which the request may be tried again.
    """
    super().__init__(message)
    self.status = status
    self.param = param
    self.code = code
    self.retry_after = retry_after


def unauthorised(message: str) -> Refusal:
  """A 401: the key is missing or opens nothing."""
  return Refusal(message, status=401, code="invalid_api_key")
