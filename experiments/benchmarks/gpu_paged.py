"""How fast does the rollout engine decode on a GPU, and its paged attention?

Question:  what the kernel `pallas_gpu` gains over XLA's loop over pages, with
           the heads of Qwen3-0.6B (16 query heads, 8 KV heads, 128 channels,
           bfloat16): decoding rows and prompt blocks over sequences of 4k
           tokens; tokens per second of the engine at the shapes of Qwen3-0.6B
           with random weights, batch 1, 32 and 256, and the share of the
           memory's speed that this is. First the kernel is compared with XLA.
Command:   python -m experiments.benchmarks.gpu_paged [--quick]
Hardware:  an NVIDIA GPU, A100 or newer; elsewhere it exits at once.
Result:    no figures yet: it has not run on hardware.

Bandwidth is that of reading the keys and values of all sequences once, and in
the engine the weights once a step besides. What it is compared with is measured:
a copy of half a gigabyte, read and written.
"""

import argparse
from collections.abc import Callable, Mapping
import dataclasses
import json
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import engine as engine_benchmark
from experiments.benchmarks import gpu_attention
from forge_jax.engine import attention
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib

KINDS = ("pallas_gpu", "xla")
MODEL = model_config.ModelConfig(  # Qwen3-0.6B
  vocab_size=151936,
  width=1024,
  num_layers=28,
  num_heads=16,
  num_kv_heads=8,
  head_dim=128,
  mlp_width=3072,
  max_context=40960,
  rope_theta=1_000_000.0,
  norm_eps=1e-6,
  tied_embeddings=True,
  qk_norm=True,
)
BATCHES = (1, 32, 256)
_TOLERANCE = 2e-2  # of the largest figure, for bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows of a step: R sequences of a length, W new tokens each."""

  rows: int
  width: int
  length: int = 4096  # with the new tokens
  page: int = 64
  heads: int = 16
  kv_heads: int = 8
  channels: int = 128
  dtype: jnp.dtype = jnp.bfloat16

  @property
  def cache_bytes(self) -> int:
    """Of the keys and values that are read, each once."""
    size = 2 * self.kv_heads * self.channels * jnp.dtype(self.dtype).itemsize
    return self.rows * self.length * size


CASES = (*(Case(batch, 1) for batch in BATCHES), Case(8, 256))


def inputs(case: Case) -> tuple[jax.Array, attention.Cache, attention.Rows]:
  """Random queries [R * W, H, C], pages, and rows that use all of them."""
  pages = -(-case.length // case.page)
  count = case.rows * pages + 1
  shapes = attention.cache_shapes(
    "pallas_gpu", count, case.page, case.kv_heads, case.channels
  )
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (case.rows * case.width, case.heads, case.channels)
  q, *cache = (
    jax.random.normal(key, shape, case.dtype)
    for key, shape in zip(keys, (shape, *shapes), strict=True)
  )
  order = np.random.default_rng(0).permutation(count - 1) + 1
  full = lambda value: jnp.full(case.rows, value, jnp.int32)
  rows = attention.Rows(
    jnp.zeros((case.rows, case.width), jnp.int32),
    full(case.length - case.width),
    full(case.width),
    jnp.asarray(order.reshape(case.rows, pages), jnp.int32),
  )
  return q, tuple(cache), rows


def attend(case: Case, kind: str) -> Callable[..., jax.Array]:
  """Attention of the rows, compiled."""

  def run(q, cache, rows):
    none = jax.tree.map(lambda x: x[:0], rows)
    parts = (rows, none) if case.width == 1 else (none, rows)
    return attention.attend(kind, q, cache, case.kv_heads, *parts)

  return jax.jit(run)


def compare(case: Case, repeats: int) -> list[dict[str, object]]:
  """A row of figures a kind.

  Raises:
    RuntimeError: the kinds differ.
  """
  args = inputs(case)
  runs = {kind: attend(case, kind) for kind in KINDS}
  got, want = (np.asarray(runs[k](*args), np.float32) for k in KINDS)
  error = float(np.abs(got - want).max() / np.abs(want).max())
  if not error < _TOLERANCE:
    raise RuntimeError(f"pallas_gpu is wrong on this GPU: {error:.1e}")
  rows = []
  for kind in KINDS:
    seconds = gpu_attention.seconds(runs[kind], args, repeats)
    figures = {
      "ms": 1e3 * seconds,
      "gb_per_s": case.cache_bytes / seconds / 1e9,
    }
    shape = {"rows": case.rows, "width": case.width, "length": case.length}
    rows.append({**shape, "kind": kind, "error": error, **figures})
  return rows


def copy_gb_per_s(size: int = 1 << 28) -> float:
  """Bytes that a copy reads and writes; `size` in 2-byte numbers."""
  source = jnp.ones(size, jnp.bfloat16)
  run = jax.jit(lambda x: x + 1)
  return 4 * size / gpu_attention.seconds(run, (source,), 5) / 1e9


def decode(
  model: model_config.ModelConfig,
  batches: tuple[int, ...],
  copied: float,
  *,
  new: int,
  runs: int,
) -> Mapping[str, dict[str, float]]:
  """Tokens per second of the engine, by batch, and their share of `copied`."""
  decoder = decoder_lib.Decoder(
    model, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)
  )
  engine = engine_benchmark.start(
    decoder,
    slots=batches[-1],
    decode_rows=batches,
    prefill_rows=(8,),
    prefill_chunk=128,
    warm_shaped=False,
  )
  state = decoder_lib.flatten(nnx.state(decoder))
  weights = sum(x.nbytes for x in state.values())
  token = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
  found = {}
  for batch in batches:
    _, speed = engine_benchmark.speed(
      engine, model.vocab_size, batch, new, runs
    )
    cached = batch * token * (engine_benchmark.PROMPT + new / 2)
    moved = speed / batch * (weights + cached) / 1e9
    found[str(batch)] = {"tokens_per_s": speed, "roofline": moved / copied}
  engine.stop()
  return found


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--quick", action="store_true", help="fewer runs")
  quick = parser.parse_args().quick
  if jax.default_backend() != "gpu":
    sys.exit(f"this needs a GPU; JAX found only {jax.devices()}")
  rows = []
  for case in CASES:
    for row in compare(case, 3 if quick else 10):
      if not rows:
        print("".join(f"{name:>16}" for name in row))
      gpu_attention.show(row)
      rows.append(row)
  copied = copy_gb_per_s()
  size = {"new": 32, "runs": 1} if quick else {"new": 128, "runs": 3}
  result = {
    "benchmark": "gpu_paged",
    "device": jax.devices()[0].device_kind,
    "attention": rows,
    "copy_gb_per_s": copied,
    "decode": decode(MODEL, BATCHES, copied, **size),
  }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
