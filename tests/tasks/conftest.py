import os

import pytest

from forge_jax import errors
from forge_jax.agents.sandbox import bubblewrap
from forge_jax.tasks import judge


@pytest.fixture(scope="session")
def sandbox():
  """Opens sandboxes that see the installed packages."""
  config = bubblewrap.BubblewrapConfig(show=(judge.packages(),))
  try:
    return bubblewrap.Bubblewrap(config)
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))
