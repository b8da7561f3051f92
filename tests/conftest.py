"""Test-wide settings: CPU, a persistent compilation cache, strict JAX."""

import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")


def pytest_addoption(parser):
  parser.addoption(
    "--full", action="store_true", help="random tests at their full length"
  )


@pytest.fixture(scope="session")
def full(request) -> bool:
  """Whether random tests run at their full length."""
  return request.config.getoption("--full")
