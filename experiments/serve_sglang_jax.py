"""sglang-jax's engine as a server whose weights can be updated.

Question:  none; this serves.
Command:   python -m launch.engine --config=experiments/serve_sglang_jax.py
             --config.sglang_jax.model_path=my_model
           in an environment of sglang-jax's own (docs/engines.md)
On a CPU:  --config.sglang_jax.arguments.device=cpu
             --config.sglang_jax.arguments.attention_backend=native
             --config.sglang_jax.arguments.dtype=float32
             --config.sglang_jax.arguments.max_total_tokens=2048
             --config.sglang_jax.arguments.disable_precompile=True
Hardware:  a TPU that holds the model twice while weights are updated.
Result:    it says where it listens, as experiments/serve_engine.py does.
"""

import ml_collections
from ml_collections import config_dict

from forge_jax import settings
from forge_jax.engine import server, sglang


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = ml_collections.ConfigDict()
  config.name = "serve_sglang_jax"
  config.question = __doc__.partition("\n")[0]
  config.drain_seconds = 60.0
  # Names and meanings are those of sglang-jax's ServerArgs.
  arguments = {
    "device": "tpu",
    "attention_backend": "fa",
    "dtype": "bfloat16",
    "tp_size": 1,
    "max_running_requests": 64,
    "max_total_tokens": config_dict.placeholder(int),  # None: what fits
    "disable_precompile": False,
    "random_seed": 0,
    "log_level": "warning",
  }
  config.sglang_jax = ml_collections.ConfigDict(
    settings.defaults(
      sglang.SGLangJaxConfig, model_path="", arguments=arguments
    )
  )
  config.server = ml_collections.ConfigDict(
    settings.defaults(server.EngineServerConfig, "api_key", port=30000)
  )
  return config.lock()
