"""How fast is tree attention, and what does packing cost and save?

Question: forward and forward+backward CPU time of the block-sparse attention
against the dense reference, by block size, at the heads of SmolLM2-135M (9
query heads, 3 key heads, 64 channels, float32); and the host time of packing.
The tree is that of 80 requests: 8 rollouts of a shared prompt, 10 turns each,
every turn's prompt being the whole history.

Command: python -m experiments.benchmarks.tree [--quick]
Hardware: any; process CPU time is printed, the least of several runs.
Expected: the block-sparse attention wins at both sizes, by more at 4096.
"""

from collections.abc import Callable, Sequence
import json
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import types
from forge_jax.tree import attention, pack

HEADS, KV_HEADS, CHANNELS, VOCAB = 9, 3, 64, 4096
ROLLOUTS, TURNS = 8, 10

_QUICK = flags.DEFINE_bool("quick", False, "the small tree only, fewer runs")


def requests(tokens: int) -> list[types.Sample]:
  """80 requests whose forest nearly fills `tokens`."""
  rng = np.random.default_rng(0)
  prompt = rng.integers(0, VOCAB, tokens // 8)
  turn_tokens = (tokens - len(prompt)) // (ROLLOUTS * TURNS)
  response_tokens = max(turn_tokens // 2, 1)
  samples = []
  for rollout in range(ROLLOUTS):
    history = prompt
    for turn in range(TURNS):
      new = rng.integers(0, VOCAB, turn_tokens)
      cut = turn_tokens - response_tokens
      samples.append(
        types.Sample(
          name=f"{rollout}/{turn}",
          prompt_ids=np.concatenate([history, new[:cut]]),
          response_ids=new[cut:],
          logprobs=np.full(response_tokens, -8.0, np.float32),
          advantages=np.ones(response_tokens, np.float32),
          weights=np.ones(response_tokens, np.float32),
          versions=np.zeros(response_tokens, np.int32),
        )
      )
      history = np.concatenate([history, new])
  return samples


def cpu_seconds(function: Callable[[], object], repeats: int) -> float:
  """Least process CPU time of a call, compilation apart."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    start = time.process_time()
    jax.block_until_ready(function())
    times.append(time.process_time() - start)
  return min(times)


def measure(
  samples: Sequence[types.Sample],
  tokens: int,
  block: int,
  implementation: str,
  repeats: int,
) -> dict[str, object]:
  """One row of the table; times in milliseconds of CPU."""
  config = pack.PackConfig(
    tokens=tokens, edges=tokens, rows=tokens, block=block
  )
  start = time.process_time()
  batches, stats = pack.pack(samples, config, vocab_size=VOCAB)
  pack_seconds = time.process_time() - start
  plan = jax.device_put(batches[0].layout)
  rng = np.random.default_rng(1)
  q, k, v = (
    jnp.asarray(rng.normal(size=(1, tokens, heads, CHANNELS)), jnp.float32)
    for heads in (HEADS, KV_HEADS, KV_HEADS)
  )

  def attend(q, k, v):
    return attention.tree_attention(
      q, k, v, plan, block=block, implementation=implementation
    )

  forward = jax.jit(attend)
  both = jax.jit(
    jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2))
  )
  return {
    "tokens": tokens,
    "implementation": implementation,
    "block": block,
    "block_pairs": int(batches[0].layout.query_start[0, -1]),
    "forward_ms": 1e3 * cpu_seconds(lambda: forward(q, k, v), repeats),
    "both_ms": 1e3 * cpu_seconds(lambda: both(q, k, v), repeats),
    "pack_ms": 1e3 * pack_seconds,
    "packs": stats.packs,
    "fill": stats.fill,
    "merge_ratio": stats.merge_ratio,
    "pair_ratio": stats.pair_ratio,
  }


def show(row: dict[str, object]) -> None:
  """Prints a row of the table."""
  print(
    "".join(
      f"{value:>15.2f}" if isinstance(value, float) else f"{value:>15}"
      for value in row.values()
    ),
    flush=True,
  )


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  sizes, repeats = ((1024,), 2) if _QUICK.value else ((1024, 4096), 5)
  rows = []
  for tokens in sizes:
    samples = requests(tokens)
    for implementation, block in (
      ("xla", 64),
      ("xla", 128),
      ("xla", 256),
      ("reference", 128),
    ):
      row = measure(samples, tokens, block, implementation, repeats)
      if not rows:
        print("".join(f"{name:>15}" for name in row))
      show(row)
      rows.append(row)
  print(json.dumps({"benchmark": "tree", "rows": rows}))


if __name__ == "__main__":
  app.run(main)
