"""The engine on several devices says what it says on one."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny_engine import decoder

from forge_jax import errors, settings
from forge_jax.engine import config, runner

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """On one and on four devices; see tensor_parallel_run.py."""
  folder = tmp_path_factory.mktemp("weights") / "v3"
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": str(HERE.parents[1]),
  }
  done = subprocess.run(
    [sys.executable, str(HERE / "tensor_parallel_run.py"), str(folder)],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_tokens_and_log_probabilities_are_those_of_one_device(runs):
  one, four = runs
  assert [run["devices"] for run in runs] == [1, 4]
  # Drafts were verified, and pages were brought back from the host.
  assert all(run["accepted_tokens"] and run["loaded_pages"] for run in runs)
  for said, want in zip(four["said"], one["said"], strict=True):
    assert said[0] == want[0] and said[2] == want[2]
    np.testing.assert_allclose(said[1], want[1], atol=1e-5)
  greedy = one["said"][::6]  # the same request to four versions
  assert len({tuple(ids) for ids, _, _ in greedy}) == 3  # two are the same
  assert [set(versions) for _, _, versions in greedy] == [{0}, {1}, {2}, {3}]


def test_nothing_compiles_after_the_start_and_the_first_update(runs):
  for run in runs:
    serving = [count for _, count in run["compiled"]]
    assert serving == [0] * 4
    assert run["compiled"][2][0] == 0  # arrays like those of the update before


def test_every_device_has_its_share(runs):
  one, four = runs
  assert not one["shards"]
  shards = {
    "(100, 32) (25, 32)",  # the embedding and the head
    "(256, 32) (64, 32)",  # queries, keys and values
    "(32, 128) (32, 32)",
    "(96, 32) (24, 32)",  # gate and up
    "(32, 48) (32, 12)",
    "(13, 8, 8, 8) (13, 2, 8, 8)",  # pages
  }
  assert shards <= set(four["shards"])


def test_a_model_that_cannot_be_split_is_refused():
  some = config.EngineConfig(context=64, tensor_parallel=4)
  with pytest.raises(errors.ConfigError, match=r"tensor=4.* needs 4 devices"):
    runner.Runner(decoder(), some)
  with pytest.raises(errors.ConfigError, match="tensor_parallel=0 is below 1"):
    config.EngineConfig(tensor_parallel=0)


def test_it_is_a_key_of_a_configuration():
  values = settings.defaults(config.EngineConfig, tensor_parallel=2)
  made = settings.section(config.EngineConfig, values, "engine")
  assert made.tensor_parallel == 2
