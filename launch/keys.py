"""Keys from the environment: a command line can be read by others."""

import os

from forge_jax import errors

ADMIN_TOKEN = "FORGE_ADMIN_TOKEN"  # of a gateway
ENGINE_KEY = "FORGE_ENGINE_API_KEY"  # of the engines' servers


def admin_token() -> str:
  """The admin token of a gateway.

  Raises:
    ConfigError: it is not set.
  """
  token = os.environ.get(ADMIN_TOKEN, "")
  if not token:
    raise errors.ConfigError(
      f"the environment variable {ADMIN_TOKEN} is not set: whoever opens "
      "sessions at the gateway needs it"
    )
  return token


def engine_key() -> str | None:
  """The key of engines' servers; None: they need none."""
  return os.environ.get(ENGINE_KEY) or None
