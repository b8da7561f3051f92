"""The built-in engine and its server, from a configuration."""

import asyncio
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from forge_jax import paths, settings
from forge_jax.engine import config as engine_config
from forge_jax.engine import engine as engine_lib
from forge_jax.engine import grammar
from forge_jax.engine import server as server_lib
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import files, published
from launch import served_engine


class EngineService(served_engine.ServedEngine):
  """Loads the model when started; see `launch.serving.Server`."""

  def __init__(self, values: Mapping[str, Any]):
    """Checks the configuration.

    Raises:
      ConfigError: a key is unknown or missing, or a value cannot work.
    """
    super().__init__(values, "engine", "model")
    self._model = values["model"]
    self._engine_config = settings.section(
      engine_config.EngineConfig, values["engine"], "engine"
    )
    self._engine: engine_lib.JaxEngine | None = None

  async def start(self) -> None:
    """Reads the model, compiles, and listens.

    Raises:
      CheckpointError: the model is missing or malformed.
      EngineError: the port is in use.
    """
    await asyncio.to_thread(self._load)
    await self._server.start()

  async def stop(self) -> None:
    await super().stop()
    if self._engine is not None:
      await asyncio.to_thread(self._engine.stop)

  def _load(self) -> None:
    config, params = files.read_model(self._model["path"])
    version, weights = 0, self._model["weights"]
    if weights:
      version = published.version(weights)
      params = published.read(weights, config, version)
    decoder = decoder_lib.Decoder.from_params(
      config, params, dtype=jnp.dtype(self._model["dtype"])
    )
    tokenizer = tokenizer_lib.load_tokenizer(
      paths.resolve_model_path(self._model["path"])
    )
    self._engine = engine_lib.JaxEngine(
      decoder,
      self._engine_config,
      decode_text=tokenizer.decode,
      grammars=grammar.Grammars(tokenizer, config.vocab_size),
      version=version,
    )
    self._engine.start()
    eos = tokenizer.eos_token_id
    self._server = server_lib.EngineServer(
      self._engine,
      self._server_config,
      eos_token_ids=() if eos is None else (eos,),
    )
