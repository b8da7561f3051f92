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
  ):
    """Holds the HTTP status, the offending parameter and an error code."""
    super().__init__(message)
    self.status = status
    self.param = param
    self.code = code
