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


@pytest.mark.parametrize("tpu", ["v5p", "v5e", "v6e"])
def test_a_step_of_decoding_rows_and_blocks_compiles(tpu):
  library = os.environ.get("TPU_LIBRARY_PATH", str(LIBRARY))
  if not pathlib.Path(library).exists():
    why = f"the compiler for TPUs is not at {library}: `make test` installs it"
    if os.environ.get("REQUIRE_LIBTPU"):
      pytest.fail(why)
    pytest.skip(why)
  # Qwen3-0.6B's heads; each row a token and three drafts.
  sizes = ("16", "8", "128", "32", "64", "4", "16", "16")
  done = subprocess.run(
    [sys.executable, str(HERE / "paged_tpu_compile.py"), tpu, *sizes],
    env=os.environ | {"TPU_LIBRARY_PATH": library, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  figures = json.loads(done.stdout.splitlines()[-1])
  assert figures["kernel"]
  # The pages are updated in place, and nothing gathers them.
  assert figures["alias_bytes"] >= figures["cache_bytes"]
  assert figures["temp_bytes"] < figures["cache_bytes"] / 8
