"""sglang-jax's engine and our server of it, from a configuration."""

from collections.abc import Mapping
from typing import Any

from forge_jax import settings
from forge_jax.engine import server as server_lib
from forge_jax.engine import sglang
from launch import served_engine


class SGLangJaxService(served_engine.ServedEngine):
  """Loads the model when started; see `launch.serving.Server`."""

  def __init__(self, values: Mapping[str, Any]):
    """Checks the configuration.

    Raises:
      ConfigError: a key is unknown or missing, or a value cannot work.
    """
    super().__init__(values, "sglang_jax")
    self._config = settings.section(
      sglang.SGLangJaxConfig, values["sglang_jax"], "sglang_jax"
    )

  async def start(self) -> None:
    """Reads the model, compiles, and listens.

    Raises:
      EngineError: the port is in use.
    """
    # sglang-jax is there in an environment of its own only.
    from forge_jax.engine import sglang_jax

    engine = sglang_jax.SGLangJaxEngine(self._config)
    self._server = server_lib.EngineServer(engine, self._server_config)
    await self._server.start()
