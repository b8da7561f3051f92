"""Sections of a configuration, and every experiment that ships."""

import dataclasses
import importlib
import pathlib

import pytest

from forge_jax import errors, settings
from launch import build

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
def test_every_experiment_loads_and_fits_its_components(name):
  module = importlib.import_module(f"experiments.{name}")
  assert "python -m launch" in module.__doc__
  plan = build.Blueprint(module.get_config().to_dict())
  assert plan.steps >= 1 and plan.mixture().task(0).domain in plan.domains


def test_whatever_is_no_configuration_says_how_it_is_run():
  others = [path for path in FILES if path.stem not in EXPERIMENTS]
  assert EXPERIMENTS and others
  for path in others:
    assert f"python -m experiments.{path.stem}" in path.read_text("utf-8")
