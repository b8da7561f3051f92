"""What every engine behind our server has in common, from a configuration."""

from collections.abc import Mapping
from typing import Any

from forge_jax import settings
from forge_jax.engine import server as server_lib
from launch import keys

_SECTIONS = ("drain_seconds", "name", "question", "server")


class ServedEngine:
  """Its subclasses make `_server` in `start`; see `launch.serving.Server`."""

  def __init__(self, values: Mapping[str, Any], *sections: str):
    """Checks the configuration.

    Args:
      values: the configuration.
      sections: what it has beside those of every engine.

    Raises:
      ConfigError: a key is unknown or missing, or a value cannot work.
    """
    settings.check_keys(values, (*_SECTIONS, *sections))
    self._server_config = settings.section(
      server_lib.EngineServerConfig,
      values["server"],
      "server",
      api_key=keys.engine_key(),
    )
    self._server: server_lib.EngineServer | None = None

  @property
  def url(self) -> str:
    return self._server.url

  async def drain(self, seconds: float) -> None:
    await self._server.drain(seconds)

  async def stop(self) -> None:
    if self._server is not None:
      await self._server.stop()
