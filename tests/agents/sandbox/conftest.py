"""Sandboxes to test, and ways to look at what they leave behind."""

import asyncio
import contextlib
import os
import pathlib
import re

import pytest
import pytest_asyncio

from forge_jax import errors
from forge_jax.agents.sandbox import bubblewrap, containers

PROBES = pathlib.Path(__file__).parent / "probes"


@pytest_asyncio.fixture
async def open_box():
  """Opens sandboxes of the kernel; skips the test where there can be none."""
  async with contextlib.AsyncExitStack() as stack:

    async def _open(limits=None, *, gateway=None, **config):
      try:
        backend = bubblewrap.Bubblewrap(bubblewrap.BubblewrapConfig(**config))
        opened = await backend.open(limits, gateway=gateway)
      except errors.SandboxError as error:
        lacking = "not installed|needs user namespaces|needs Linux"
        if "REQUIRE_SANDBOX" in os.environ or not re.search(
          lacking, str(error)
        ):
          raise
        pytest.skip(str(error))
      return await stack.enter_async_context(opened)

    yield _open


@pytest_asyncio.fixture
async def open_container():
  """Opens containers of the engine and image that the environment names."""
  engine, image = map(os.environ.get, ("SANDBOX_ENGINE", "SANDBOX_IMAGE"))
  if not engine or not image:
    pytest.skip("needs SANDBOX_ENGINE and SANDBOX_IMAGE")
  backend = containers.Containers(
    containers.ContainerConfig(image, engine=engine)
  )
  async with contextlib.AsyncExitStack() as stack:

    async def _open(limits=None, *, gateway=None):
      opened = await backend.open(limits, gateway=gateway)
      return await stack.enter_async_context(opened)

    yield _open


@pytest.fixture
def probe_files():
  """The probes, by file name."""
  return {path.name: path.read_bytes() for path in PROBES.glob("*.py")}


def processes_with(mark):
  """Ids of the machine's processes with a word in their command lines."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      if mark.encode() in path.read_bytes():
        found.append(int(path.parent.name))
  return found


@pytest.fixture
def none_left():
  """Waits until no process has a word in its command line."""

  async def wait(mark):
    for _ in range(500):
      if not processes_with(mark):
        return
      await asyncio.sleep(0.01)
    raise AssertionError(f"left: {processes_with(mark)}")

  return wait
