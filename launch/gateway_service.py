"""A gateway in front of engines of other processes, from a configuration.

Nothing here imports JAX.
"""

import asyncio
from collections.abc import Mapping
import dataclasses
from typing import Any

from forge_jax import errors, settings
from forge_jax.engine import openai_completions, remote, sglang
from forge_jax.gateway import router as router_lib
from forge_jax.gateway import server as server_lib
from forge_jax.gateway import tokenizer as tokenizer_lib
from launch import keys

_SECTIONS = (
  *("drain_seconds", "gateway", "model", "name", "question"),
  *("openai", "router", "sglang", "upstream"),
)
_KINDS = {
  "sglang": (sglang.SGLangEngine, sglang.SGLangConfig),
  "openai": (
    openai_completions.CompletionsEngine,
    openai_completions.CompletionsConfig,
  ),
}


class GatewayService:
  """Connects to its engines when started; see `launch.serving.Server`."""

  def __init__(self, values: Mapping[str, Any]):
    """Checks the configuration and reads the tokenizer.

    Raises:
      ConfigError: a key is unknown or missing, or a value cannot work.
      CheckpointError: there is no tokenizer at the model's path.
    """
    settings.check_keys(values, _SECTIONS)
    kind, urls = values["upstream"]["kind"], values["upstream"]["urls"]
    if kind not in _KINDS:
      raise errors.ConfigError(
        f"config.upstream.kind={kind!r}; expected one of {sorted(_KINDS)}"
      )
    if not urls:
      raise errors.ConfigError("config.upstream.urls names no server")
    engine, config_type = _KINDS[kind]
    config = settings.section(
      config_type, values[kind], kind, url="", api_key=keys.engine_key()
    )
    self._wait_seconds = values["upstream"]["wait_seconds"]
    if len(urls) > 1:  # a request goes elsewhere instead of waiting
      config = dataclasses.replace(config, patience=0.0)
    self._engines: list[remote.RemoteEngine] = [
      engine(dataclasses.replace(config, url=url)) for url in urls
    ]
    self._router = router_lib.Router(
      self._engines,
      settings.section(router_lib.RouterConfig, values["router"], "router"),
    )
    gateway_config = settings.section(
      server_lib.GatewayConfig,
      values["gateway"],
      "gateway",
      admin_token=keys.admin_token(),
    )
    tokenizer = tokenizer_lib.load_tokenizer(values["model"]["path"])
    self._gateway = server_lib.Gateway(self._router, tokenizer, gateway_config)

  @property
  def url(self) -> str:
    return self._gateway.url

  async def start(self) -> None:
    """Waits for the engines, then listens.

    Raises:
      EngineError: an engine is out of reach or no engine.
      GatewayError: the port is in use.
    """
    await asyncio.gather(
      *(engine.connect(self._wait_seconds) for engine in self._engines)
    )
    await self._gateway.start()

  async def drain(self, seconds: float) -> None:
    await self._gateway.drain(seconds)

  async def stop(self) -> None:
    await self._gateway.stop()
    await asyncio.gather(*(engine.aclose() for engine in self._engines))
