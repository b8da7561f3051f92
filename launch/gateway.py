"""Serves the gateway in front of engines of other processes; needs no JAX.

FORGE_ADMIN_TOKEN=... python -m launch.gateway
  --config=experiments/serve_gateway.py
  --config.upstream.urls="('http://127.0.0.1:30000', 'http://127.0.0.1:30001')"
  --config.gateway.port=8080      any value can be overridden
FORGE_ENGINE_API_KEY in the environment: the key of the engines' servers, if any
"""

from launch import cli

_CONFIG = cli.define_config()


def main(argv):
  del argv
  # The rest is imported only once the flags are good.
  from launch import gateway_service, serving

  values = _CONFIG.value.to_dict()
  service = gateway_service.GatewayService(values)
  serving.run("gateway", service, values["drain_seconds"])


if __name__ == "__main__":
  cli.run(main)
