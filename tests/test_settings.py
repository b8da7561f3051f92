"""Sections of a configuration, and every experiment that ships."""

import dataclasses
import importlib
import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from forge_jax import errors, settings
from forge_jax.model import scratch
from launch import (
  build,
  engine_service,
  gateway_service,
  keys,
  rollout_side,
  sglang_jax_service,
)

FILES = sorted(
  path
  for path in (pathlib.Path(__file__).parents[1] / "experiments").glob("*.py")
  if path.stem != "__init__"
)
# The others are simulations, which `launch` does not run.
EXPERIMENTS = [
  path.stem for path in FILES if "def get_config" in path.read_text("utf-8")
]


@dataclasses.dataclass(frozen=True)
class Part:
  rate: float = 0.5
  sizes: tuple[int, ...] = (1, 2)
  seed: int = 0


def test_a_section_becomes_its_dataclass():
  part = settings.section(Part, {"rate": 2.0, "sizes": [3]}, "part", seed=7)
  assert part == Part(2.0, (3,), 7)


@pytest.mark.parametrize("key", ["rte", "seed"])
def test_an_unknown_key_names_the_nearest(key):
  with pytest.raises(errors.ConfigError, match=rf"config\.part .*'{key}'"):
    settings.section(Part, {key: 1}, "part", seed=7)


@dataclasses.dataclass(frozen=True)
class Other:
  width: int = 3


def test_two_parts_share_a_section():
  shared = settings.defaults(Part, "seed", rate=1.0) | {"width": 5}
  parts = settings.shared_section(
    shared, "both", (Part, {"seed": 2}), (Other, {})
  )
  assert parts == [Part(1.0, (1, 2), 2), Other(5)]
  with pytest.raises(errors.ConfigError, match="did you mean 'width'"):
    settings.shared_section({"widht": 1}, "both", (Part, {}), (Other, {}))


def test_differences_name_the_keys():
  old = {"a": {"b": 1, "c": (1, 2)}, "d": 2}
  new = {"a": {"b": 2, "c": [1, 2]}, "d": 2}
  assert settings.differences(old, new) == ["a.b: 1 -> 2"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_loads_and_fits_its_components(name, monkeypatch):
  monkeypatch.setenv(keys.ADMIN_TOKEN, "token")
  module = importlib.import_module(f"experiments.{name}")
  command = re.search(r"python -m launch\.(\w+)", module.__doc__)
  values = module.get_config().to_dict()
  match command[1]:
    case "engine" if "sglang_jax" in values:
      sglang_jax_service.SGLangJaxService(values)
    case "engine":
      engine_service.EngineService(values)
    case "gateway":
      gateway_service.GatewayService(values)
    case "train" | "warm_start" as main:
      if main == "warm_start":
        settings.section(
          scratch.ScratchConfig, values.pop("scratch"), "scratch"
        )
      plan = build.Blueprint(values)
      assert (
        plan.steps >= 1
        and plan.side.mixture.task(0).domain in plan.side.domains
      )
    case other:
      pytest.fail(f"{name} names no known command, but {other}")


def test_a_server_needs_every_section_and_no_other(monkeypatch):
  from experiments import serve_gateway

  monkeypatch.delenv(keys.ADMIN_TOKEN, raising=False)
  values = serve_gateway.get_config().to_dict()
  upstream = values["upstream"]
  for broken, message in (
    ({**values, "extra": 1}, "config.extra is unknown"),
    (
      {k: v for k, v in values.items() if k != "router"},
      "config.router is mis",
    ),
    (values | {"router": {"blok": 3}}, "did you mean 'block'"),
    (
      values | {"upstream": upstream | {"kind": "x"}},
      "'openai', 'sglang'",
    ),
    (values | {"upstream": upstream | {"urls": ()}}, "names no server"),
    (values, "FORGE_ADMIN_TOKEN is not set"),
  ):
    with pytest.raises(errors.ConfigError, match=message):
      gateway_service.GatewayService(broken)


def test_whatever_is_no_configuration_says_how_it_is_run():
  others = [path for path in FILES if path.stem not in EXPERIMENTS]
  assert EXPERIMENTS and others
  for path in others:
    assert f"python -m experiments.{path.stem}" in path.read_text("utf-8")


def make_agent(side, closing):
  return side, closing


def test_an_agent_of_ones_own_has_a_place():
  from experiments import word_problems_smollm2

  values = word_problems_smollm2.get_config().to_dict()
  values["agent"]["place"] = f"{__name__}:make_agent"
  side = rollout_side.RolloutSide(values)
  assert side.make_agent("closing") == (side, "closing")
  values["agent"]["place"] = f"{__name__}:nothing"
  # Before anything is started or written.
  with pytest.raises(errors.ConfigError, match=r"agent\.place: nothing at"):
    rollout_side.RolloutSide(values)


def test_what_an_agent_is_made_of_can_be_said_by_flags(monkeypatch):
  from experiments import word_problems_smollm2

  argv = [
    "train",
    f"--config.agent.place={__name__}:make_agent",
    "--config.agent.helpers=3",
    "--config.agent.scaffolds=('native', 'xml')",
    "--config.agent.mcp=('desk=python3 server.py',)",
    "--config.sandbox.ready=0",
  ]
  monkeypatch.setattr(sys, "argv", argv)  # where overrides are looked for
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
    "config", word_problems_smollm2.get_config(), flag_values=values
  )
  values(argv)
  side = rollout_side.RolloutSide(values.config.to_dict())
  assert side.make_agent("closing") == (side, "closing")
  config = side.lineup.config
  assert (config.helpers, config.scaffolds) == (3, ("native", "xml"))
  assert config.servers().servers[0].command == ("python3", "server.py")
  assert side.lineup.sandbox.ready == 0


def test_evaluations_may_manage_the_context_in_their_own_way():
  from experiments import word_problems_smollm2

  values = word_problems_smollm2.get_config().to_dict()
  side = rollout_side.RolloutSide(values)
  assert side.evaluated is side.lineup
  values["eval"]["context"] = "truncate"
  side = rollout_side.RolloutSide(values)
  assert side.lineup.context.strategy == "none"
  assert side.evaluated.context.strategy == "truncate"
  values["eval"]["context"] = "forget"
  with pytest.raises(errors.ConfigError, match="'forget'; expected one of"):
    rollout_side.RolloutSide(values)
