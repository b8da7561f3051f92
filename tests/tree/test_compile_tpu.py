"""Attention and a trainer's step compile for TPUs, on a machine without one.

What libtpu 0.0.50.1 makes of forward and backward in bfloat16, blocks of 512
(see tpu_compile.py; bundles are of a head and a pair without the mask, nothing
here was timed on a chip):

                        temporary        forward        backward   vector
  TPU      T  H  K   C      bytes  bundles  busy  bundles   busy   memory
  v5p  16384 16  8 128     0.41 G     1078   84%     2461    89%  4.0 MiB
  v5p  65536 16  8 128     1.64 G     1090   84%     2461    89%  4.0 MiB
  v5p  16384  9  3  64     0.15 G     1085   84%     2235    90%  4.1 MiB
  v5p  65536  9  3  64     0.76 G     1091   84%     2235    90%  4.3 MiB
  v5e  16384 16  8 128     0.34 G     1077   84%     2381    89%  4.0 MiB
  v5e  65536 16  8 128     1.63 G     1077   84%     2381    89%  4.0 MiB
  v5e  16384  9  3  64     0.14 G     1076   84%     2179    90%  4.2 MiB
  v5e  65536  9  3  64     0.61 G     1076   84%     2186    89%  4.3 MiB
  v6e  16384 16  8 128     0.34 G      884   48%     1403    76%  4.1 MiB
  v6e  65536 16  8 128     1.63 G      882   48%     1406    76%  4.1 MiB
  v6e  16384  9  3  64     0.10 G      880   48%     1318    76%  4.2 MiB
  v6e  65536  9  3  64     0.61 G      880   48%     1325    76%  4.1 MiB

Blocks: for the same area of scores, H = 16 and C = 128, forward and backward
together, blocks of 128, 256 and 1024 take 2.6, 1.6 and 0.96 times the bundles of
blocks of 512 on v5p, and 3.5, 2.3 and 0.87 times on v6e; steps have a fixed cost
of about 400 bundles besides. Larger blocks waste more where trees are bushy.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
LIBRARY = ROOT / ".libtpu" / "libtpu" / "libtpu.so"


def compiled(*words):
  """Figures of the compiled cases; see tpu_compile.py."""
  library = os.environ.get("TPU_LIBRARY_PATH", str(LIBRARY))
  if not pathlib.Path(library).exists():
    why = f"the compiler for TPUs is not at {library}: `make test` installs it"
    if os.environ.get("REQUIRE_LIBTPU"):
      pytest.fail(why)
    pytest.skip(why)
  done = subprocess.run(
    [sys.executable, str(HERE / "tpu_compile.py"), *words],
    env=os.environ | {"TPU_LIBRARY_PATH": library, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  print(done.stdout)
  return [json.loads(line) for line in done.stdout.splitlines()]


# The least share of the matrix units' cycles that the schedules of the forward
# and the backward kernel may keep busy. Heads of 128 channels fill half of a
# v6e's unit in the products of queries and keys.
BUSY = {"v5p": (0.75, 0.8), "v5e": (0.75, 0.8), "v6e": (0.4, 0.65)}


@pytest.mark.parametrize("tpu", BUSY)
def test_attention_compiles(tpu):
  wide = ("attention", tpu, "65536", "16", "8", "128", "512", "bfloat16")
  narrow = ("attention", tpu, "16384", "9", "3", "64", "512", "bfloat16")
  for figures in compiled(*wide, *narrow):
    # Linear in T: a [T, T] mask of bytes, or a mask of each block pair for both
    # kernels, is more than five times the arguments.
    assert figures["temp_bytes"] < 4 * figures["argument_bytes"]
    for kernel, least in zip(("forward", "backward"), BUSY[tpu], strict=True):
      assert min(figures["kernels"][kernel]["matrix_units_busy"]) > least
      assert figures["kernels"][kernel]["vector_bytes"] < 8 * 2**20


def test_a_sharded_trainer_step_compiles():
  layer, elementwise = compiled(
    *("step", "v5p", "layer"), *("step", "v5p", "elementwise")
  )
  # Keeping matrix products costs memory, or the policy has no effect.
  assert elementwise["temp_bytes"] > layer["temp_bytes"]
