"""Serves an engine over HTTP, in SGLang's native API.

python -m launch.engine --config=experiments/serve_engine.py
  --config.server.port=30000      any value can be overridden
--config=experiments/serve_sglang_jax.py serves sglang-jax's in place of ours
FORGE_ENGINE_API_KEY in the environment: the key that clients need, if any
"""

from launch import cli

_CONFIG = cli.define_config()


def main(argv):
  del argv
  # JAX is imported only once the flags are good.
  from launch import serving

  values = _CONFIG.value.to_dict()
  if "sglang_jax" in values:
    from launch import sglang_jax_service

    service = sglang_jax_service.SGLangJaxService(values)
  else:
    from launch import compilations, engine_service

    compilations.keep()
    service = engine_service.EngineService(values)
  serving.run("engine", service, values["drain_seconds"])


if __name__ == "__main__":
  cli.run(main)
