"""Distances between what is trained and what was generated."""

import numpy as np
import pytest
from scipy import stats

from forge_jax.pool import drift


@pytest.mark.parametrize("n, m", [(1, 1), (5, 7), (200, 31)])
def test_the_distance_of_figures_is_kolmogorov_smirnov(n, m):
  rng = np.random.default_rng(n)
  for _ in range(20):
    # Whole numbers, so that there are ties within and between the samples.
    one, other = rng.integers(0, 9, n), rng.integers(2, 12, m)
    expected = stats.ks_2samp(one, other).statistic
    assert drift.distance(one, other) == pytest.approx(expected)


def test_the_distance_of_categories_is_total_variation():
  assert drift.category_distance("aabb", "ab") == 0
  assert drift.category_distance("aab", "c") == pytest.approx(1)
  assert drift.category_distance("aaab", "abbb") == pytest.approx(0.5)


def test_noise_is_the_mean_distance_of_equals():
  rng = np.random.default_rng(0)
  found = [drift.distance(rng.random(200), rng.random(300)) for _ in range(300)]
  assert drift.noise(200, 300) == pytest.approx(np.mean(found), rel=0.06)
