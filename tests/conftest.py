"""Test-wide settings: CPU, a persistent compilation cache, strict JAX, no clock.

And a PostgreSQL server of the tests' own, on loopback, for one session.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import tempfile

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# How fast examples are made and run says what else the machine does.
hypothesis.settings.register_profile(
  "no clock",
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("no clock")


def pytest_addoption(parser):
  parser.addoption(
    "--full", action="store_true", help="random tests at their full length"
  )


@pytest.fixture(scope="session")
def full(request) -> bool:
  """Whether random tests run at their full length."""
  return request.config.getoption("--full")


def _programs() -> pathlib.Path | None:
  """Where initdb and pg_ctl are; Debian keeps them off the path."""
  found = shutil.which("pg_ctl")
  if found:
    return pathlib.Path(found).resolve().parent
  versions = pathlib.Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")
  return max((path.parent for path in versions), default=None)


def _free_port() -> int:
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return one.getsockname()[1]


@pytest.fixture(scope="session")
def postgres_server():
  """The connection string of a real server; skips where there is none."""
  programs = _programs()
  if programs is None:
    if os.environ.get("REQUIRE_POSTGRES"):
      pytest.fail("REQUIRE_POSTGRES is set and PostgreSQL is not installed")
    pytest.skip("PostgreSQL is not installed")
  # The server refuses to run as root.
  user = "postgres" if os.geteuid() == 0 else None
  # A socket's path must be short, and the other user must be able to reach it.
  folder = pathlib.Path(tempfile.mkdtemp(prefix="forge-pg-", dir="/tmp"))
  if user:
    shutil.chown(folder, user)
  data, port = folder / "data", _free_port()

  def run(*command):
    done = subprocess.run(
      command,
      user=user,
      cwd=folder,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert done.returncode == 0, done.stdout

  options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder}"
  try:
    run(
      programs / "initdb",
      "-D",
      data,
      "-A",
      "trust",
      "-U",
      "forge",
      "-E",
      "UTF8",
      "--locale=C",
    )
    run(
      programs / "pg_ctl",
      "-D",
      data,
      "-o",
      options,
      "-w",
      "-l",
      folder / "log",
      "start",
    )
    try:
      yield f"postgresql://forge@127.0.0.1:{port}/postgres"
    finally:
      run(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
  finally:
    shutil.rmtree(folder)
