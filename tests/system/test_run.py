"""Whole runs of launch/ in one process, on a tiny model over real loopback."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small_run

from forge_jax import errors
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.model import huggingface
from forge_jax.observe import metrics as metrics_lib
from forge_jax.observe import names
from forge_jax.pool import store
from launch import local

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def values(model):
  return small_run.values(model)


def curve(workdir):
  """What a run measured in training, without what depends on the clock."""
  return {
    (e.step, name): value
    for e in metrics_lib.read_jsonl(workdir / "metrics.jsonl")
    for name, value in e.values.items()
    if name.split("/")[0] in ("train", "ratio", "tree", "lag")
  }


def test_a_synchronous_run_repeats_and_continues(values, tmp_path):
  local.LocalRun(values, tmp_path / "whole").train()
  local.LocalRun(values | {"steps": 2}, tmp_path / "parts").train()
  local.LocalRun(values, tmp_path / "parts").train()
  assert small_run.sampled(tmp_path / "whole") == small_run.sampled(
    tmp_path / "parts"
  )
  # The last bit of a float32 sum is nobody's promise.
  whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
  assert (4, "train/grad_norm") in whole and whole.keys() == parts.keys()
  for key, value in whole.items():
    assert parts[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
  params, host = small_run.params_of(tmp_path / "whole")
  others, host_of_parts = small_run.params_of(tmp_path / "parts")
  assert host == host_of_parts and host["queue"]["consumed"]["head"] == 16
  untrained = small_run.untrained_params()
  for name, value in params.items():
    np.testing.assert_allclose(others[name], value, atol=1e-5, err_msg=name)
  moved = params["layers/mlp/up/kernel"] - untrained["layers/mlp/up/kernel"]
  assert np.abs(moved).max() > 1e-3


def test_a_run_leaves_what_it_promises(values, tmp_path):
  values["rollout"]["max_lag"] = 1  # rollouts go on while the trainer steps
  values["checkpoint"] |= {"every": 1, "keep": 1}
  values["pool"] |= {"keep_steps": 0, "segment_bytes": 1}
  local.LocalRun(values | {"steps": 3}, tmp_path / "run").train()
  run = tmp_path / "run"
  summary = json.loads((run / "summary.json").read_text())
  assert {
    "heldout_before",
    "heldout_after",
    "phrasings_before",
    "phrasings_after",
    "seconds",
    "peak_rss_gb",
    "steps",
    "seed",
    "versions",
  } <= summary.keys()
  assert summary["steps"] == 3 and summary["versions"]["jax"]
  page = (run / "report.html").read_text()
  assert "heldout" in page and "again" in page
  assert list((run / "tensorboard").iterdir())
  assert json.loads((run / "config.json").read_text())["steps"] == 3
  with store.DataPool.open(run / "pool", readonly=True) as pool:
    first, _, last = pool.claims()
    stored = set(pool.indices())
  # What no restart asks for is gone, its segments emptied.
  assert stored.isdisjoint(first.trained) and stored >= set(last.trained)
  assert not (run / "pool/segment-00000000.log").stat().st_size
  mismatch = [
    e.values["mismatch/max"]
    for e in metrics_lib.read_jsonl(run / "metrics.jsonl")
    if "mismatch/max" in e.values
  ]
  assert mismatch and max(mismatch) <= 1e-4
  result = local.evaluate_checkpoint(str(run), {"heldout": 6, "phrasings": 0})
  assert result == {"step": 3, "heldout": summary["heldout_after"]}
  assert local.export_checkpoint(str(run), str(tmp_path / "exported")) == 3
  config, exported = huggingface.read_huggingface(tmp_path / "exported")
  assert config == small_run.MODEL
  for name, value in small_run.params_of(run)[0].items():
    np.testing.assert_array_equal(exported[name], value)
  tokenizer = tokenizer_lib.load_tokenizer(tmp_path / "exported")
  assert tokenizer.decode(tokenizer.encode("CALC(5 + 8)")) == "CALC(5 + 8)"


def test_a_curated_run_counts_what_it_drops_and_replays(values, tmp_path):
  values["steps"] = 3
  values["eval"] |= {"heldout": 0, "phrasings": 0, "every": 0}
  values["curation"] |= {
    "zero_variance": True,
    "min_tokens": 1,
    "replay": 0.25,
    "resubmit": ("zero_variance",),
  }
  local.LocalRun(values, tmp_path / "run").train()
  events = list(metrics_lib.read_jsonl(tmp_path / "run/metrics.jsonl"))
  counts = [
    {k: v for k, v in e.values.items() if k.startswith("curation/")}
    for e in events
    if "train/loss" in e.values
  ]
  assert [c[names.CURATION_REPLAYED] for c in counts] == [0, 1, 2]
  assert counts[-1][names.CURATION_LENGTH] == 0
  with store.DataPool.open(tmp_path / "run/pool", readonly=True) as pool:
    claims = pool.claims()
    trained = [pool.get(i) for claim in claims for i in claim.trained]
  # Three new groups a step, each of which has something to tell apart.
  assert [len(claim.trained) for claim in claims] == [3, 3, 3]
  assert all(len({e.perf for e in group.episodes}) > 1 for group in trained)
  dropped = sum(len(claim.dropped) + len(claim.again) for claim in claims)
  assert counts[-1][names.CURATION_ZERO_VARIANCE] == dropped
  again = sum(len(claim.again) for claim in claims)
  assert counts[-1].get(names.CURATION_RESUBMITTED, 0) == again


def test_a_working_directory_keeps_one_configuration(values, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(values))
  local.LocalRun(values | {"steps": 9}, tmp_path)
  with pytest.raises(errors.ConfigError, match=r"seed: 0 -> 5.*new --workdir"):
    local.LocalRun(values | {"seed": 5}, tmp_path)


def test_a_run_that_cannot_start_leaves_nothing_behind(values, tmp_path):
  values["model"]["path"] = str(tmp_path / "none.gguf")
  with pytest.raises(errors.CheckpointError, match="no such file"):
    local.LocalRun(values, tmp_path / "run").train()
  assert not (tmp_path / "run").exists()


def test_a_collapse_ends_a_run_and_names_a_checkpoint(values, tmp_path):
  values["stability"] |= {"window": 1, "collapse_steps": 1}
  values["stability"] |= {"collapse_share": 1.0}  # any fall is a collapse
  values["checkpoint"] |= {"every": 1}
  values["eval"] |= {"heldout": 0, "phrasings": 0, "every": 0}
  with pytest.raises(errors.CollapseError, match="good checkpoint is that of"):
    local.LocalRun(values | {"steps": 40}, tmp_path / "run").train()


def test_unknown_keys_are_named_with_the_nearest(values, tmp_path):
  values["trainer"]["groups_per_stp"] = 4
  with pytest.raises(errors.ConfigError, match="'groups_per_step'"):
    local.LocalRun(values, tmp_path)
  del values["trainer"]["groups_per_stp"]
  values["domains"] = {"chess": {}}
  with pytest.raises(errors.ConfigError, match=r"chess.*word_problems"):
    local.LocalRun(values, tmp_path)


def test_the_mains_turn_mistakes_into_one_line_and_status_1(tmp_path):
  def fails(*arguments):
    done = subprocess.run(
      [sys.executable, "-m", *arguments],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]

  experiment = "--config=experiments/word_problems_smollm2.py"
  line = fails("launch.train", experiment, "--config.trainer.learnin_rate=1")
  assert "learning_rate" in line
  line = fails("launch.eval", f"--checkpoint={tmp_path}")
  assert "no run is there" in line
