"""Distances between what is trained and what was generated."""

import numpy as np
import pytest
from scipy import stats

from forge_jax import errors
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


def features(rng, count, **fixed):
  drawn = {
    "length": rng.integers(10, 100, count).astype(float),
    "domain": rng.choice(["code", "search"], count).tolist(),
    "seconds": rng.lognormal(size=count),
    "success": rng.choice([0.0, 1.0], count),
  }
  drawn |= {name: [value] * count for name, value in fixed.items()}
  return [drift.Features(*row) for row in zip(*drawn.values(), strict=True)]


CONFIG = drift.DriftConfig(recent=200, reference=2000, adapt=True)


def meter_of(trained):
  meter = drift.DriftMeter(CONFIG)
  for one in features(np.random.default_rng(0), 2000):
    meter.generate(one)
  meter.train(trained)
  return meter


def test_what_is_trained_as_generated_has_no_drift_and_the_widest_window():
  meter = meter_of(features(np.random.default_rng(1), 200))
  assert meter.drift < 0.05
  assert meter.width(100) == 100


@pytest.mark.parametrize(
  "name, value",
  [("length", 1.0), ("domain", "code"), ("seconds", 0.01), ("success", 1.0)],
)
def test_every_feature_is_watched(name, value):
  rng = np.random.default_rng(1)
  meter = meter_of(features(rng, 200, **{name: value}))
  assert meter.by_feature[name] == meter.drift > 0.3
  assert all(d < 0.1 for n, d in meter.by_feature.items() if n != name)
  assert meter.width(100) == 10  # over `alarm`: the least


def test_the_window_narrows_as_the_drift_grows():
  widths = []
  for drifted in (0, 30, 50, 80):
    rng = np.random.default_rng(1)
    easy = features(rng, drifted, domain="code")
    widths.append(meter_of(easy + features(rng, 200 - drifted)).width(1000))
  assert widths[0] == 1000 and widths == sorted(widths, reverse=True)
  assert len(set(widths)) > 2


def test_too_few_groups_say_nothing():
  meter = meter_of(features(np.random.default_rng(1), 199, domain="code"))
  assert (meter.drift, meter.width(8)) == (0.0, 8)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"recent": 9, "reference": 8}, "recent is 9 and reference 8"),
    ({"least": 0.5, "most": 0.4}, "least is 0.5 and most 0.4"),
    ({"calm": 0.0}, "calm is 0.0"),
    ({"alarm": 1.5}, "alarm 1.5"),
  ],
)
def test_bad_drift_configs_are_refused(fields, message):
  with pytest.raises(errors.ConfigError, match=message):
    drift.DriftConfig(**fields)
