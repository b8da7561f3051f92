"""How fast is tree attention on a GPU, beside cuDNN's causal attention?

Forward and forward+backward of `pallas_gpu` and `xla` at the heads of
Qwen3-0.6B (16 query heads, 8 key heads, 128 channels, bfloat16), 16k to 64k
unique tokens, over two trees: `chain`, one sequence, whose visible pairs are
those of causal attention, and `rollouts`, 16 rollouts of a shared prompt whose
turns each think on a branch of their own. cuDNN runs the chain. Work is counted
in visible pairs: 4 * H * C operations forward and 14 * H * C with backward, so
a tile's invisible pairs lower the figure. First the kernels are compared with
the dense reference on a small tree.

Command: python -m experiments.benchmarks.gpu_attention [--quick]
Hardware: an NVIDIA GPU, A100 or newer; elsewhere it exits at once.
Expected: no figures yet: it has not run on hardware.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import json
import statistics
import sys
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import types
from forge_jax.tree import layout
from forge_jax.tree.attention import pallas_gpu, reference, xla

_CALLS = 5  # between two looks at the clock
_TOLERANCE = 2e-2  # of the largest figure, for bfloat16


@dataclasses.dataclass(frozen=True)
class Heads:
  """The attention that is measured."""

  query: int = 16
  key: int = 8
  channels: int = 128
  block: int = 128
  dtype: jnp.dtype = jnp.bfloat16


def chain(tokens: int) -> np.ndarray:
  """subtree_end of one sequence."""
  return np.full(tokens, tokens, np.int32)


def rollouts(tokens: int, count: int = 16, turn: int = 256) -> np.ndarray:
  """subtree_end of rollouts that share a prompt of a quarter of the tokens.

  The first half of a turn stays in the history; the second is thinking, a
  branch that nothing later sees.
  """
  end_T = np.full(tokens, tokens, np.int32)
  edges = np.linspace(tokens // 4, tokens, count + 1).astype(int)
  for start, stop in itertools.pairwise(edges):
    end_T[start:stop] = stop
    for first in range(start, stop, turn):
      last = min(first + turn, stop)
      end_T[first + turn // 2 : last] = last
  return end_T


TREES = {"chain": chain, "rollouts": rollouts}


def visible_pairs(end_T: np.ndarray) -> int:
  """Pairs of a query and a key it sees."""
  return int((end_T - np.arange(len(end_T))).sum())


def inputs(tokens: int, heads: Heads) -> list[jax.Array]:
  """q, k, v and an output's gradient, random, for one pack."""
  counts = (heads.query, heads.key, heads.key, heads.query)
  shape = (1, tokens, sum(counts), heads.channels)
  everything = jax.random.normal(jax.random.key(0), shape, heads.dtype)
  return jnp.split(everything, np.cumsum(counts)[:-1], axis=2)


def plan_of(end_T: np.ndarray, heads: Heads) -> types.TreeLayout:
  """The layout of one pack, on the device."""
  return jax.device_put(layout.build(end_T[None], heads.block))


def attends(
  heads: Heads, *, causal: str, interpret: bool
) -> dict[str, tuple[Callable, Callable]]:
  """Forward, and forward with backward, by name; compiled once a shape.

  Args:
    heads: the block is that of the plans.
    causal: JAX's causal attention that is measured beside ours: "cudnn", or
      "xla" where there is no GPU. It ignores the plan.
    interpret: of the kernels.
  """
  block = heads.block

  def beside(q, k, v, plan):
    del plan
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation=causal
    )

  functions = {
    "causal": beside,
    "pallas_gpu": lambda q, k, v, plan: pallas_gpu.attention(
      q, k, v, plan, block, interpret=interpret
    ),
    "xla": lambda q, k, v, plan: xla.attention(q, k, v, plan, block),
    "reference": reference.attention,
  }
  return {
    name: (jax.jit(function), jax.jit(both(function)))
    for name, function in functions.items()
  }


def both(attend: Callable) -> Callable:
  """Output and gradients."""

  def run(q, k, v, plan, do):
    o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, plan), q, k, v)
    return o, *pull(do)

  return run


def largest_error(runs, heads: Heads, tokens: int) -> float:
  """Of o, dq, dk, dv against the reference, relative to the largest figure."""
  q, k, v, do = inputs(tokens, heads)
  plan = plan_of(rollouts(tokens, count=4, turn=96), heads)
  got, want = (
    runs[name][1](q, k, v, plan, do) for name in ("pallas_gpu", "reference")
  )
  errors = []
  for x, y in zip(got, want, strict=True):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    errors.append(np.abs(x - y).max() / np.abs(y).max())
  return float(np.max(errors))  # NaN stays NaN


def seconds(run: Callable, args: Sequence[jax.Array], repeats: int) -> float:
  """Median time of a call, compilation apart; calls queue without waiting."""
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready([run(*args) for _ in range(_CALLS)])
    times.append((time.perf_counter() - start) / _CALLS)
  return statistics.median(times)


def measure(
  runs, end_T: np.ndarray, heads: Heads, repeats: int
) -> dict[str, float]:
  """Milliseconds and TFLOP/s over the visible pairs, both ways."""
  q, k, v, do = inputs(len(end_T), heads)
  plan = plan_of(end_T, heads)
  forward = seconds(runs[0], (q, k, v, plan), repeats)
  whole = seconds(runs[1], (q, k, v, plan, do), repeats)
  work = visible_pairs(end_T) * heads.query * heads.channels / 1e12
  return {
    "forward_ms": 1e3 * forward,
    "both_ms": 1e3 * whole,
    "forward_tflops": 4 * work / forward,
    "both_tflops": 14 * work / whole,
  }


def compare(
  runs, tokens: int, heads: Heads, repeats: int
) -> list[dict[str, object]]:
  """A row per tree and implementation, each beside causal attention."""
  rows = []
  for tree, name in (
    ("chain", "causal"),
    *itertools.product(TREES, ("pallas_gpu", "xla")),
  ):
    figures = measure(runs[name], TREES[tree](tokens), heads, repeats)
    row = {"tokens": tokens, "tree": tree, "implementation": name, **figures}
    rows.append(row)
    for way in ("forward", "both"):
      beside = rows[0][f"{way}_tflops"]
      row[f"{way}_of_causal"] = row[f"{way}_tflops"] / beside
  return rows


def show(row: Mapping[str, object]) -> None:
  """Prints a row of the table."""
  print(
    "".join(
      f"{value:>16.3f}" if isinstance(value, float) else f"{value:>16}"
      for value in row.values()
    ),
    flush=True,
  )


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  if jax.default_backend() != "gpu":
    sys.exit(f"this needs a GPU; JAX found only {jax.devices()}")
  heads = Heads()
  runs = attends(heads, causal="cudnn", interpret=False)
  error = largest_error(runs, heads, 2048)
  print(f"largest error against the reference: {error:.1e}", flush=True)
  if not error < _TOLERANCE:
    sys.exit(f"pallas_gpu is wrong on this GPU: more than {_TOLERANCE}")
  rows = []
  quick = flags.FLAGS.quick
  repeats = 3 if quick else 10
  for tokens in (16384,) if quick else (16384, 32768, 65536):
    for row in compare(runs, tokens, heads, repeats):
      if not rows:
        print("".join(f"{name:>16}" for name in row))
      show(row)
      rows.append(row)
  device = jax.devices()[0].device_kind
  result = {"benchmark": "gpu_attention", "device": device, "error": error}
  print(json.dumps({**result, "rows": rows}))


if __name__ == "__main__":
  # Here, because a test imports several benchmarks that have this flag.
  flags.DEFINE_bool("quick", False, "16k tokens only, fewer runs")
  app.run(main)
