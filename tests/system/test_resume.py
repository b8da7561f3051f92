"""A run that is killed and continued ends as one that never was, bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import resume_run
import small_run

from forge_jax.observe import metrics as metrics_lib
from forge_jax.pool import store

KILLS = int(os.environ.get("FORGE_KILLS", "2"))  # docs/data_pool.md has 10's
STEPS = 5 + 2 * KILLS


def lead(workdir, model, *signals):
  """Plays a run; returns what it claimed, its weights and their host values."""
  root = pathlib.Path(__file__).parents[2]
  numbers = [str(int(number)) for number in signals]
  done = subprocess.run(
    [sys.executable, resume_run.__file__, workdir, model, str(STEPS), *numbers],
    cwd=root,
    env=os.environ | {"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-4000:]
  with store.DataPool.open(workdir / "pool", readonly=True) as pool:
    claims = [(claim.step, claim.trained) for claim in pool.claims()]
  return claims, *small_run.params_of(workdir)


def test_signals_change_neither_weights_nor_what_is_trained(model, tmp_path):
  """The first life ends by SIGTERM, with a checkpoint; the next by SIGKILL."""
  kills = [signal.SIGKILL] * KILLS
  claims, params, host = lead(tmp_path / "whole", model)
  others, parts, other_host = lead(
    tmp_path / "parts", model, signal.SIGTERM, *kills
  )
  assert [step for step, _ in claims] == list(range(1, STEPS + 1))
  assert others == claims and other_host == host
  assert small_run.sampled(tmp_path / "whole") == small_run.sampled(
    tmp_path / "parts"
  )
  for run in ("whole", "parts"):  # a line of metrics a step, none lost or twice
    events = metrics_lib.read_jsonl(tmp_path / run / "metrics.jsonl")
    steps = [event.step for event in events if "train/loss" in event.values]
    assert steps == list(range(1, STEPS + 1)), run
  for name, value in params.items():
    np.testing.assert_array_equal(parts[name], value, err_msg=name)
  untrained = small_run.untrained_params()
  assert any((params[name] != untrained[name]).any() for name in params)
