"""Compiles a step for TPUs that are not there; prints a JSON line.

Run by test_compile_paged_tpu.py in a process of its own, with four forced CPU
devices, on which the engine is made. By hand:

  python tests/engine/step_tpu_compile.py TPU

TPU is one of v5p, v5e, v6e, of which four share the step. Needs
TPU_LIBRARY_PATH, the path of libtpu.so.
"""

import json
import re
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import paged_tpu_compile

from forge_jax.engine import batch
from forge_jax.engine import config as engine_config
from forge_jax.engine import runner as runner_lib
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding

# Qwen3-0.6B, but for the number of layers and of tokens, and with a module.
MODEL = model_config.ModelConfig(
  vocab_size=8192,
  width=1024,
  num_layers=2,
  num_heads=16,
  num_kv_heads=8,
  head_dim=128,
  mlp_width=3072,
  max_context=4096,
  qk_norm=True,
  mtp_modules=1,
)
CONFIG = engine_config.EngineConfig(
  slots=32,
  context=1024,
  cache_tokens=8192,
  decode_rows=(32,),
  prefill_rows=(16,),
  attention="pallas_tpu",
  tensor_parallel=4,
)


def main(tpu):
  mesh = sharding.make_mesh(
    sharding.MeshConfig(tensor=4), paged_tpu_compile.devices(tpu)
  )
  runner = runner_lib.Runner(
    decoder_lib.Decoder(MODEL, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)),
    CONFIG,
  )
  runner._mesh = mesh
  at = lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec)
  abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at(x))
  pages = runner._pages.layers, runner._pages.modules
  inputs = jax.tree.map(abstract, (runner._weights, *pages))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    batch.make([], [], 32, 16, CONFIG),
  )
  step = jax.jit(
    runner._run_fn,
    donate_argnums=(1, 2),
    out_shardings=(whole, whole, *jax.tree.map(at, pages)),
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = step.lower(*inputs, rows)
  compiled = lowered.compile()
  text = compiled.as_text()
  moves = re.findall(
    r" = (.*) (all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\(",
    text,
  )
  figures = {
    "kernels": text.count("tpu_custom_call"),
    "moves": moves,
    "alias_bytes": compiled.memory_analysis().alias_size_in_bytes,
    "cache_bytes": sum(x.nbytes for x in jax.tree.leaves(runner._pages.layers)),
  }
  print(json.dumps(figures))


if __name__ == "__main__":
  main(*sys.argv[1:])
