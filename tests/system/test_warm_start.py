"""A model of random weights imitates scripts over the real loop."""

import pathlib
import subprocess
import sys

from experiments import records_warm_start
from forge_jax.gateway import scripted
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.model import files
from forge_jax.observe import metrics
from forge_jax.tasks import records
from launch import build, local, new_model, services

ROOT = pathlib.Path(__file__).parents[2]


def test_imitation_makes_the_scripts_likelier(tmp_path):
  values = records_warm_start.get_config().to_dict()
  shape = values.pop("scratch") | {"width": 16, "mlp_width": 16, "episodes": 40}
  values["steps"] = 6
  values["rollout"]["in_flight"] = 16
  values["trainer"] |= {"groups_per_step": 8, "warmup_updates": 0}
  values["pack"] |= {"tokens": 1024, "edges": 1024, "rows": 1024, "buckets": 1}
  values["eval"]["heldout"] = 4
  values["model"]["path"] = str(tmp_path / "scratch")
  new_model.write(tmp_path / "scratch", values, shape)
  # A word of the closed vocabulary that the episodes had is one token.
  tokenizer = tokenizer_lib.load_tokenizer(str(tmp_path / "scratch"))
  sizes = [len(tokenizer.encode(f" {name}")) for name in records.NAMES]
  assert sizes.count(1) > len(sizes) / 4

  run = tmp_path / "run"
  local.LocalRun(values, str(run)).train()
  found = [
    event.values["train/loss"]
    for event in metrics.read_jsonl(run / "metrics.jsonl")
    if "train/loss" in event.values
  ]
  assert len(found) == 6 and found[-1] < 0.96 * found[0]

  local.export_checkpoint(str(run), str(tmp_path / "model"))
  config, _ = files.read_model(str(tmp_path / "model"))
  assert (config.width, config.vocab_size) == (16, len(tokenizer))


def test_an_evaluation_manages_the_context_in_its_own_way():
  values = records_warm_start.get_config().to_dict()
  del values["scratch"]
  values["imitate"] = ("optimal",)
  values["domains"]["records"] |= {"starts": (1, 1), "hops": (3, 3)}
  values["context"]["keep"] = 1
  values["eval"]["context"] = "truncate"
  plan = build.Blueprint(values)
  tokenizer = scripted.byte_tokenizer()
  teacher = plan.teacher(tokenizer, max_context=2**20)
  with services.Services(
    teacher, tokenizer, plan.parts["gateway"], plan.side
  ) as running:
    (episode,) = running.evaluate("train", 1).episodes
  assert episode.perf == 1.0
  changes = [m["content"] for m in episode.messages if m["role"] == "context"]
  assert changes == ["truncate: 1 messages dropped"] * 2


def test_one_that_goes_on_from_a_model_makes_none_of_its_own(tmp_path):
  run = subprocess.run(
    [
      *(sys.executable, "-m", "launch.warm_start"),
      "--config=experiments/records_warm_start.py",
      f"--config.model.path={tmp_path / 'gone'}",
      f"--workdir={tmp_path / 'run'}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 1
  assert str(tmp_path / "gone") in run.stderr
  assert not (tmp_path / "run").exists()
