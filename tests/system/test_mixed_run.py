"""A run over several domains, with tools in sandboxes and a curriculum."""

import collections
import os
import shutil

import pytest
import small_run

from forge_jax import errors
from forge_jax.agents.sandbox import bubblewrap
from forge_jax.gateway import scripted
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.observe import metrics as metrics_lib
from forge_jax.observe import names
from forge_jax.pool import store
from launch import local


@pytest.fixture
def values(model, tmp_path):
  try:
    bubblewrap.Bubblewrap()
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))
  folder = shutil.copytree(model, tmp_path / "model")
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  tokenizer.chat_template = scripted.CHAT_TEMPLATE  # one that shows tools
  tokenizer.save_pretrained(folder)
  made = small_run.values(folder)
  made["domains"] |= {
    "slow_tools": {
      "seconds": 0.0,
      "max_tokens": 8,
      "curriculum": {"level": [[0, 0], [1, 2]]},
    },
    "terminal": {"max_tokens": 8},
  }
  made["agent"] |= {"max_turns": 2}
  made["engine"] |= {"context": 512}
  made["rollout"] |= {"group_size": 2, "quotas": {"terminal": 0.5}}
  made["trainer"] |= {"groups_per_step": 8}
  made["eval"] |= {"heldout": 0, "phrasings": 0, "every": 0}
  return made | {"steps": 2}


def test_domains_are_mixed_and_their_figures_kept(values, tmp_path):
  local.LocalRun(values, tmp_path / "run").train()
  with store.DataPool.open(tmp_path / "run/pool", readonly=True) as pool:
    groups = [pool.get(index) for index in range(16)]
  counts = collections.Counter(group.task.domain for group in groups)
  assert set(counts) == {"even", "slow_tools", "terminal"}
  levels = {
    (group.number // 8, group.task.level)
    for group in groups
    if group.task.domain == "slow_tools"
  }
  assert levels == {(0, 0), (1, 2)}
  assert {e.error for g in groups for e in g.episodes} == {None}
  last = list(metrics_lib.read_jsonl(tmp_path / "run/metrics.jsonl"))[-1]
  assert last.values[f"{names.DOMAIN_LEVEL}/slow_tools"] == 2
  shares = [last.values[f"{names.DOMAIN_SHARE}/{name}"] for name in counts]
  assert sum(shares) == pytest.approx(1)
  assert names.WATCH_ALARMS in last.values
