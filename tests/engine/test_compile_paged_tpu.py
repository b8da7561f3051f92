"""Paged attention compiles for TPUs, on a machine without one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
LIBRARY = ROOT / ".libtpu" / "libtpu" / "libtpu.so"


def compiled(script, *words, **environment):
  """Figures of what a script compiles; see there."""
  library = os.environ.get("TPU_LIBRARY_PATH", str(LIBRARY))
  if not pathlib.Path(library).exists():
    why = f"the compiler for TPUs is not at {library}: `make test` installs it"
    if os.environ.get("REQUIRE_LIBTPU"):
      pytest.fail(why)
    pytest.skip(why)
  paths = {"TPU_LIBRARY_PATH": library, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, str(HERE / script), *words],
    env=os.environ | paths | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tpu", ["v5p", "v5e", "v6e"])
def test_a_step_of_decoding_rows_and_blocks_compiles(tpu):
  # Qwen3-0.6B's heads; each row a token and three drafts.
  sizes = ("16", "8", "128", "32", "64", "4", "16", "16")
  figures = compiled("paged_tpu_compile.py", tpu, *sizes)
  assert figures["kernel"]
  # The pages are updated in place, and nothing gathers them.
  assert figures["alias_bytes"] >= figures["cache_bytes"]
  assert figures["temp_bytes"] < figures["cache_bytes"] / 8


def test_a_step_of_four_chips_compiles():
  figures = compiled(
    "step_tpu_compile.py",
    "v5e",
    XLA_FLAGS="--xla_force_host_platform_device_count=4",
  )
  # Attention of two layers; nothing reads what the module attends to.
  assert figures["kernels"] == 2
  # The chips add up the residual stream after the embedding and, of each layer,
  # after attention and MLP, and gather the logits; nothing else passes between
  # them, neither weights nor pages.
  moved = [(kind, shape.split("{")[0]) for shape, kind in figures["moves"]]
  assert moved.count(("all-reduce", "bf16[288,1024]")) == 1
  assert moved.count(("all-reduce", "bf16[1024,288]")) == 2 * 2
  assert set(moved) == {
    ("all-reduce", "bf16[288,1024]"),
    ("all-reduce", "bf16[1024,288]"),
    ("all-gather", "f32[48,8192]"),
  }
  assert figures["alias_bytes"] >= figures["cache_bytes"] / 4
