"""Freed memory goes back to the system."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import pathlib
import numpy as np
from forge_jax.engine import memory

def resident():
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

large, small = [], []
for _ in range(200):
  large.append(np.ones(1 << 20, np.uint8))
  small.append(np.ones(1 << 10, np.uint8))  # so that they do not join
del large
kept = resident()
memory.give_back()
print(kept - resident())
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc keeps it"
)
def test_freed_memory_goes_back():
  # As glibc sets them by itself once a piece of that size was freed.
  sizes = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "67108864",
  }
  returned = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env=os.environ | sizes,
    capture_output=True,
    check=True,
  ).stdout
  assert int(returned) > 150 * 2**20
