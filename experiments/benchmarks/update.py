"""How fast is the gradient of a trainer step, and what does it need?

Random weights of SmolLM2-135M's shape; 8 groups of 8 two-turn episodes with a
common system prompt, the demo's workload. Prints a line per configuration and
one JSON line: tokens per CPU-second (packed, and of the requests before
merging) and the temporary memory of the compiled program.

Command: python -m experiments.benchmarks.update        (about five minutes)
         python -m experiments.benchmarks.update --quick  (one configuration)
"""

import json
import time

from absl import app, flags
from flax import nnx
import jax
import numpy as np

from forge_jax import types
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.trainer import update
from forge_jax.tree import pack

_QUICK = flags.DEFINE_bool("quick", False, "Measure one configuration.")
_REPEATS = 3
SMOLLM2 = model_config.ModelConfig(
  vocab_size=49152,
  width=576,
  num_layers=30,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  mlp_width=1536,
  max_context=2048,
  tied_embeddings=True,
)


def samples(rng: np.random.Generator) -> list[types.Sample]:
  """The completions of one trainer step."""
  ids = lambda n: rng.integers(0, SMOLLM2.vocab_size, n).astype(np.int32)
  size, result = 12, []
  system = ids(110)
  for group in range(8):
    question = np.concatenate([system, ids(30)])
    for member in range(8):
      history = question
      for turn in range(2):
        response = ids(size)
        result.append(
          types.Sample(
            name=f"{group}-{member}/{turn}",
            prompt_ids=history,
            response_ids=response,
            logprobs=np.full(size, -10.0, np.float32),
            advantages=np.ones(size, np.float32),
            weights=np.full(size, 1e-3, np.float32),
            versions=np.zeros(size, np.int32),
          )
        )
        history = np.concatenate([history, response, ids(16)])
  return result


def measure(remat: str, tokens: int) -> dict[str, float | str | int]:
  """One configuration: compiles, then the least of several steps."""
  packs = pack.PackConfig(tokens=tokens, edges=tokens, rows=tokens)
  batches, stats = pack.pack(
    samples(np.random.default_rng(0)), packs, vocab_size=SMOLLM2.vocab_size
  )
  updater = update.Updater(
    decoder_lib.Decoder(SMOLLM2, rngs=nnx.Rngs(params=0)),
    update.UpdateConfig(remat=remat, block=packs.block),
    sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
  )
  state = updater.initial_state()
  gradient = updater.zero_gradient(state)
  temporary = (
    updater.lower(state, gradient, batches[0])
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
  )
  seconds = []
  for _ in range(_REPEATS + 1):  # the first compiles
    started = time.process_time()
    for batch in batches:
      gradient, _ = updater.accumulate(state, gradient, batch, 0)
    jax.block_until_ready(gradient)
    seconds.append(time.process_time() - started)
  best = min(seconds[1:])
  return {
    "remat": remat,
    "pack_tokens": tokens,
    "packs": stats.packs,
    "cpu_seconds": round(best, 2),
    "packed_tokens_per_cpu_second": round(stats.packed_tokens / best),
    "request_tokens_per_cpu_second": round(stats.request_tokens / best),
    "temporary_gb": round(temporary / 1e9, 2),
  }


def main(argv):
  del argv
  todo = [("elementwise", 512)]
  if not _QUICK.value:
    todo += [("none", 512), ("layer", 512), ("elementwise", 1024)]
  rows = []
  for remat, tokens in todo:
    rows.append(measure(remat, tokens))
    print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
  print(json.dumps({"update": rows}))


if __name__ == "__main__":
  app.run(main)
