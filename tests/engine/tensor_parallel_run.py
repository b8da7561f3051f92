"""An engine on four forced CPU devices, beside one on one; prints JSON.

Run by test_tensor_parallel.py in a process of its own, because the number of
devices is fixed when JAX starts.
"""

import asyncio
import dataclasses
import json
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from tiny_engine import collect, prompts, request

from experiments.benchmarks import tree_checks
from forge_jax import types
from forge_jax.engine import config as engine_config
from forge_jax.engine import engine as engine_lib
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp, published, sharding

MODEL = model_config.ModelConfig(
  vocab_size=100,
  width=32,
  num_layers=2,
  num_heads=16,
  num_kv_heads=8,
  head_dim=8,
  mlp_width=48,
  max_context=128,
  qkv_bias=True,
  mtp_modules=1,
)
# So few pages that some are evicted to the host, and come back.
CONFIG = engine_config.EngineConfig(
  slots=4,
  context=64,
  page=8,
  cache_tokens=96,
  host_cache_tokens=512,
  decode_rows=(4,),
  prefill_rows=(4,),
  draft_tokens=1,
  draft_adaptive=False,
  warm_shaped=True,
)
ASKED = ({"temperature": 0.0}, {}, {"logit_bias": ((5, 3.0),), "top_p": 0.9})


def state(seed: int) -> nnx.State:
  """Random weights; some of what their module drafts is right."""
  trunk = dataclasses.replace(MODEL, mtp_modules=0)
  made = decoder_lib.Decoder(trunk, rngs=nnx.Rngs(params=seed))
  # Small random logits sample almost uniformly.
  made.head.embedding.set_value(made.head.embedding.get_value() * 30)
  made = mtp.grow(made, 1, rngs=nnx.Rngs(params=seed))
  # Biases that are zero would hide where they go.
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.sin(jnp.arange(x.size)).reshape(x.shape)
      if "bias" in jax.tree_util.keystr(path)
      else x
    ),
    nnx.state(made),
  )


async def replies(engine: engine_lib.JaxEngine) -> list:
  """Tokens, log-probabilities and versions of a few requests at once."""
  asked = [
    request(str(n), prompt, max_tokens=16, seed=n, **ASKED[n % len(ASKED)])
    for n, prompt in enumerate(prompts(6, length=20))
  ]
  outs = await asyncio.gather(*(collect(engine, one) for one in asked))
  return [out[:3] for out in outs]


def run(ways: int, folder: str) -> dict:
  """What an engine says with its first weights and with later ones."""
  graph = nnx.split(decoder_lib.abstract(MODEL))[0]
  engine = engine_lib.JaxEngine(
    nnx.merge(graph, state(0)),
    dataclasses.replace(CONFIG, tensor_parallel=ways),
  )
  engine.start()
  runner = engine._runner
  trainers = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
  arrays = sharding.place(state(1), trainers)
  said, compiled = [], []
  try:
    for version, weights in enumerate(
      ({}, {"params": arrays}, {"params": arrays}, {"path": folder})
    ):
      with tree_checks.compilations() as count:
        if version:
          engine.update_weights(types.WeightsVersion(version, **weights))
          engine.settle(60)
        updating = count()
        said += asyncio.run(replies(engine))
        compiled.append([updating, count() - updating])
    stats = engine.stats()
  finally:
    engine.stop()
  shards = {
    f"{x.shape} {x.sharding.shard_shape(x.shape)}"
    for x in jax.tree.leaves((runner._weights, runner._pages.layers))
    if x.sharding.shard_shape(x.shape) != x.shape
  }
  return {
    "said": said,
    "compiled": compiled,
    "loaded_pages": int(stats["loaded_pages"]),
    "accepted_tokens": int(stats["accepted_tokens"]),
    "devices": len(runner._weights[0].sharding.device_set),
    "shards": sorted(shards),
  }


def main(folder: str) -> None:
  assert jax.device_count() == 4
  params = {k: np.asarray(x) for k, x in decoder_lib.flatten(state(2)).items()}
  published.write(folder, MODEL, params, 3)
  print(json.dumps([run(ways, folder) for ways in (1, 4)]))


if __name__ == "__main__":
  main(sys.argv[1])
