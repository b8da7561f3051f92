"""The simulator: its clock by hand, its figures on orders that are known."""

import dataclasses

import numpy as np
import pytest

from experiments import windowed_fifo as experiment
from forge_jax.pool import drift
from forge_jax.pool import window as window_lib


def config(**fields):
  defaults = {
    "in_flight": 4,
    "window": 2,
    "max_lag": None,
    "groups_per_step": 2,
  }
  return window_lib.WindowConfig(**defaults | fields)


def test_the_clock_by_hand():
  """Two slots, a straggler at the head, steps of one second."""
  durations = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
  trace = experiment.Simulation(config(), durations, 2, 1.0).run(4)
  # 1, 2 and 3 end at 1, 2 and 3, and only 1 is in the window beside 0. At 5
  # the head ends: 0 and 1 train until 6, 2 and 3 until 7.
  assert trace.tasks.tolist() == [1, 0, 2, 3]
  assert trace.lag.tolist() == [0, 1, 2, 3]
  assert trace.seconds == 7
  assert trace.idle == pytest.approx(5 / 7)
  # One slot waits from 3 to 5: item 4 may not be begun before the head moves.
  assert trace.engine_idle == pytest.approx(2 / 14)


@pytest.mark.parametrize("window, most", [(1, 3), (2, 4), (4, 6)])
def test_a_trace_keeps_the_bounds(window, most):
  rng = np.random.default_rng(0)
  durations = rng.exponential(size=500).tolist()
  rules = config(window=window)
  trace = experiment.Simulation(rules, durations, 3, 0.5).run(400)
  assert sorted(trace.tasks.tolist())[: 400 - 8] == list(range(392))
  assert trace.lag.max() <= most == rules.capacity + rules.width - 2
  ahead = trace.tasks - np.arange(400)
  assert ahead.max() <= rules.width - 1
  if window == 1:
    assert trace.tasks.tolist() == list(range(400))


def trace_of(order):
  order = np.asarray(order)
  return experiment.Trace(
    order, np.zeros(len(order), int), 1.0, 1.0, 0, 0, order
  )


def test_the_figures_of_a_random_order_and_of_a_sorted_one():
  rng = np.random.default_rng(0)
  durations = rng.lognormal(size=64 * experiment.STEP)
  random = experiment.measure(trace_of(np.arange(len(durations))), durations)
  assert random.drift < 0.03 and random.excess < 0.003
  assert random.gradient_noise == pytest.approx(1, abs=0.5)
  easy_first = experiment.measure(trace_of(np.argsort(durations)), durations)
  # The first 2048 of 32768 have nothing above the sixteenth: 15 / 16.
  assert easy_first.drift_by_step[0] == pytest.approx(15 / 16)
  assert easy_first.gradient_noise > 100
  assert easy_first.drift - easy_first.excess == pytest.approx(
    drift.noise(experiment.SAMPLE, len(durations))
  )


def test_a_workload_is_what_it_says():
  workload = dataclasses.replace(
    experiment.WORKLOADS["domains"], deadline=900.0, sigma=0.1
  )
  seconds = workload.durations(20_000, seed=1)
  assert seconds.max() == 900
  assert np.mean(seconds > 400) == pytest.approx(0.25, abs=0.02)
  assert np.median(seconds) == pytest.approx(62, abs=3)


def test_the_scheduler_decides_and_the_table_says_so():
  assert experiment.decision_rate(2000) > 0
  durations = np.random.default_rng(0).lognormal(size=4096)
  figures = experiment.measure(trace_of(np.arange(4096)), durations)
  text = experiment.table({"fifo": figures, "greedy": figures})
  assert (
    text.count("100.0%") == 4 and " | - | " in text and text.startswith("| W |")
  )


def test_the_adaptive_window_answers_to_the_drift():
  rng = np.random.default_rng(0)
  durations = rng.choice([1.0, 200.0], 2000).tolist()
  rules = config(in_flight=64, window=1.0, groups_per_step=8)
  meter = drift.DriftMeter(
    drift.DriftConfig(recent=32, reference=512, adapt=True)
  )
  args = rules, durations, 64, 0.1
  free = experiment.Simulation(*args).run(800)
  held = experiment.Simulation(*args, meter).run(800)
  assert set(free.width.tolist()) == {64}
  assert held.width.min() < 32 < held.width.max() == 64
