"""The page that shows how a domain is written runs as it stands."""

import pathlib
import re
import sys

import pytest

from forge_jax import errors
from forge_jax.agents.sandbox import backends
from forge_jax.rollout import baselines
from launch import registry

PAGE = pathlib.Path(__file__).parents[2] / "docs/how-to/new_task.md"


@pytest.fixture
def written(tmp_path, monkeypatch):
  code, config = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  (tmp_path / "anagrams.py").write_text(code)
  monkeypatch.syspath_prepend(str(tmp_path))
  yield code, config
  sys.modules.pop("anagrams", None)


def build(values):
  return registry.build("anagrams", values, backends.SandboxConfig(), seed=3)


async def test_the_page_s_domain_works(written, sandbox):
  code, config = written
  assert len(code.splitlines()) < 60
  section = re.search(r'\{"anagrams": (\{.*?\})\}', config)[1]
  values = eval(section)
  assert values.pop("weight") == 1.0
  domain = build(values)
  for split in ("train", "heldout"):
    best = await baselines.play(domain, split, 50, "optimal", sandbox)
    luck = await baselines.play(domain, split, 50, "random", sandbox)
    assert best.success_rate == 1.0 and luck.success_rate < 0.5
  trained = {domain.task("train", i).payload["question"] for i in range(99)}
  assert domain.task("heldout", 0).payload["question"] not in trained
  silent = domain.environment(domain.task("train", 0))
  silent.respond({"content": "listen"})
  assert [r.name for r in silent.rewards()] == ["no_answer"]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, "anagrams is unknown; known:.*terminal"),
    ({"place": "nowhere:Anagrams"}, "nothing at 'nowhere:Anagrams'"),
    ({"place": "anagrams:Nothing"}, "nothing at 'anagrams:Nothing'"),
    ({"place": "anagrams"}, "expected 'module:name'"),
    ({"place": "anagrams:Anagrams", "max_token": 1}, "'max_tokens'"),
  ],
)
def test_what_is_wrong_is_said(written, values, message):
  with pytest.raises(errors.ConfigError, match=message):
    build(values)
