"""Tree and paged attention compile for GPUs, on a machine without one."""

import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
COMPILER = ROOT / ".cuda"  # where jax-cuda13-pjrt lies


def compiled(*words):
  """Figures of the compiled cases; see gpu_compile.py."""
  if not (COMPILER / "jax_plugins").exists():
    why = f"the compiler for GPUs is not in {COMPILER}: `make test` installs it"
    if os.environ.get("REQUIRE_CUDA_COMPILER"):
      pytest.fail(why)
    pytest.skip(why)
  done = subprocess.run(
    [sys.executable, str(HERE / "gpu_compile.py"), *words],
    env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{COMPILER}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  print(done.stdout)
  return [json.loads(line) for line in done.stdout.splitlines()]


# Bytes of shared memory that a block may have.
SHARED = {"h100": 232448, "h200": 232448, "a100": 166912}


def test_tree_attention_compiles():
  shapes = (
    ("65536", "16", "8", "128", "128", "bfloat16"),
    ("16384", "9", "3", "64", "128", "bfloat16"),
    ("16384", "16", "8", "128", "128", "float32"),
  )
  cases = itertools.product(SHARED, shapes)
  results = compiled(
    *(word for gpu, shape in cases for word in ("tree", gpu, *shape))
  )
  assert len(results) == len(SHARED) * len(shapes)
  for figures in results:
    # Two numbers a query and head, and a number a tile of keys: no copy of q.
    _, gpu, T, H, *_ = figures["case"]
    assert figures["temp_bytes"] < 1.1 * 2 * 4 * int(T) * int(H)
    assert set(figures["kernels"]) == {"forward", "dq", "dkv"}
    for kernel in figures["kernels"].values():
      assert kernel["shared_bytes"] <= SHARED[gpu]
    # The tiles are chosen for Hopper; an A100 spills a few bytes.
    assert gpu == "a100" or not figures["spills"]


@pytest.mark.parametrize("gpu", SHARED)
def test_paged_attention_compiles(gpu):
  # Qwen3-0.6B's and SmolLM2-135M's heads; rows of a token and three drafts.
  cases = (
    ("16", "8", "128", "64", "64", "32", "4", "16", "16", "bfloat16"),
    ("16", "8", "128", "64", "64", "1", "1", "4", "256", "bfloat16"),
    ("9", "3", "64", "16", "64", "8", "1", "4", "64", "float32"),
  )
  for figures in compiled(
    *(w for case in cases for w in ("paged", gpu, *case))
  ):
    case = figures["case"]
    size = 2 if case[-1] == "bfloat16" else 4
    cache = 2 * 4096 * math.prod(map(int, case[3:6])) * size
    # The pages are updated in place, and nothing gathers them.
    assert figures["alias_bytes"] >= cache
    assert figures["temp_bytes"] < cache / 8
    assert len(figures["kernels"]) == 2 and not figures["spills"]
    for kernel in figures["kernels"].values():
      assert kernel["shared_bytes"] <= SHARED[gpu]
