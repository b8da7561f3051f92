import numpy as np
import pytest

from forge_jax.observe import names
from forge_jax.trainer import credit, scores


def score(domain, success, named=(), noted=(), **fields):
  made = {
    "failed": False,
    "process": 0.0,
    "speed": 0.0,
    "perf": float(success),
    "completions": 2,
    "response_tokens": 10,
    "seconds": 1.0,
    "total_S": np.array([0.0, float(success)]),
  } | fields
  return credit.Score(
    domain=domain, success=success, named=dict(named), noted=dict(noted), **made
  )


def test_figures_by_component_name_and_domain():
  found = scores.figures(
    [
      score("a", True, {"answer": 1.0}, {"answer": 1}, seconds=4.0),
      score("a", False, {"loop": -0.2}, {"loop": 2}, process=-0.1, failed=True),
      score("b", True, {"answer": 1.0}, {"answer": 1}, response_tokens=40),
    ]
  )
  assert found == pytest.approx(
    {
      f"{names.REWARD}/process": -0.1 / 3,
      f"{names.REWARD}/speed": 0.0,
      f"{names.REWARD}/perf": 2 / 3,
      f"{names.REWARD}/answer": 2 / 3,
      f"{names.REWARD}/loop": -0.2 / 3,
      f"{names.NOTED}/answer": 2 / 6,
      f"{names.NOTED}/loop": 2 / 6,
      names.EPISODE_TOKENS: 20.0,
      names.EPISODE_FAILED: 1 / 3,
      f"{names.DOMAIN_SHARE}/a": 2 / 3,
      f"{names.DOMAIN_SHARE}/b": 1 / 3,
      f"{names.DOMAIN_SUCCESS}/a": 0.5,
      f"{names.DOMAIN_SUCCESS}/b": 1.0,
      f"{names.DOMAIN_REWARD}/a": 0.5,
      f"{names.DOMAIN_REWARD}/b": 1.0,
      f"{names.DOMAIN_TOKENS}/a": 10.0,
      f"{names.DOMAIN_TOKENS}/b": 40.0,
      f"{names.DOMAIN_SECONDS}/a": 2.5,
      f"{names.DOMAIN_SECONDS}/b": 1.0,
    }
  )
  assert scores.figures([]) == {}
