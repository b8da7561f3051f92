import math
import threading

import pytest

from forge_jax.observe import metrics, names, throughput
from forge_jax.observe.throughput import Part


class Clock:
  """A clock that only moves when told."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def event(step, **values):
  return metrics.StepMetrics(step, 0.0, values)


def test_rates_of_the_step_and_of_the_run():
  clock = Clock()
  meter = throughput.Meter(clock)
  meter.add(Part.TRAINING, 100, 2.0)
  clock.now = 10.0
  first = meter.end_step()
  assert first[names.THROUGHPUT_TRAINING] == 50.0
  assert first[names.THROUGHPUT_ROLLOUT] == 0.0
  assert first[names.YIELD_THROUGHPUT] == 10.0
  meter.add(Part.TRAINING, 300, 3.0)
  clock.now = 20.0
  second = meter.end_step()
  assert second[names.THROUGHPUT_TRAINING] == 100.0
  assert second[names.YIELD_THROUGHPUT] == 20.0
  assert meter.totals()[Part.TRAINING] == throughput.Count(400, 5.0)
  assert meter.totals()[Part.TRAINING].rate == 80.0


def test_overlapping_work_is_counted_once():
  clock = Clock()
  meter = throughput.Meter(clock)
  first, second = meter.busy(Part.ROLLOUT), meter.busy(Part.ROLLOUT)
  first.__enter__()
  clock.now = 2.0
  second.__enter__()
  clock.now = 3.0
  first.__exit__(None, None, None)
  clock.now = 5.0
  assert meter.totals()[Part.ROLLOUT].seconds == 5.0  # still open
  second.__exit__(None, None, None)
  clock.now = 100.0
  with meter.busy(Part.ROLLOUT):
    clock.now = 101.0
  assert meter.totals()[Part.ROLLOUT].seconds == 6.0
  assert meter.totals()[Part.DATA].seconds == 0.0


def test_an_open_block_is_split_between_steps():
  clock = Clock()
  meter = throughput.Meter(clock)
  with meter.busy(Part.ROLLOUT):
    meter.add(Part.ROLLOUT, 10)
    clock.now = 1.0
    assert meter.end_step()[names.THROUGHPUT_ROLLOUT] == 10.0
    meter.add(Part.ROLLOUT, 40)
    clock.now = 3.0
    assert meter.end_step()[names.THROUGHPUT_ROLLOUT] == 20.0


def test_a_block_that_raises_is_closed():
  clock = Clock()
  meter = throughput.Meter(clock)
  with pytest.raises(OSError), meter.busy(Part.IO):
    clock.now = 1.0
    raise OSError
  clock.now = 5.0
  assert meter.totals()[Part.IO].seconds == 1.0


def test_counts_only_grow():
  with pytest.raises(ValueError, match="io: -1 tokens"):
    throughput.Meter().add(Part.IO, -1)


def test_threads_lose_no_token():
  meter = throughput.Meter()

  def work():
    for _ in range(2000):
      with meter.busy(Part.DATA):
        meter.add(Part.DATA, 1)

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert meter.totals()[Part.DATA].tokens == 8000


def test_yield_is_throughput_times_held_out_gain():
  j = throughput.TrainingYield()
  assert j.values() == {}
  j.observe(event(0, **{names.EVAL_HELDOUT: 0.36}))
  assert j.values() == {}
  for step, rate in ((1, 100.0), (2, 200.0)):
    j.observe(
      event(step, **{names.TRAIN_SAMPLES: 250.0, names.YIELD_THROUGHPUT: rate})
    )
  j.observe(event(2, **{names.EVAL_HELDOUT: 0.96}))
  values = j.values()
  assert values[names.YIELD_EFFICIENCY] == pytest.approx(0.6 / 0.5)
  assert values[names.YIELD_J] == pytest.approx(200.0 * 0.6 / 0.5)


def test_constraints_are_running_figures():
  j = throughput.TrainingYield(window=2)
  for step, (reward, norm) in enumerate([(0.0, 9.0), (1.0, 1.0), (1.0, 3.0)]):
    j.observe(
      event(step, **{names.TRAIN_REWARD: reward, names.TRAIN_GRAD_NORM: norm})
    )
  values = j.values()
  assert values[names.YIELD_GRAD_NORM_VARIANCE] == 1.0  # of 1 and 3 only
  assert values[names.YIELD_REWARD_CHANGE] == 0.25  # 0, 0.5, 0.75


def test_a_norm_that_is_not_finite_shows():
  j = throughput.TrainingYield()
  for norm in (1.0, math.nan):
    j.observe(event(1, **{names.TRAIN_GRAD_NORM: norm}))
  assert math.isnan(j.values()[names.YIELD_GRAD_NORM_VARIANCE])


def test_a_resumed_run_goes_on_from_its_events(tmp_path):
  path = tmp_path / "metrics.jsonl"
  rows = [
    {names.EVAL_HELDOUT: 0.2, names.EVAL_PHRASINGS: 0.1},
    {
      names.TRAIN_SAMPLES: 64,
      names.TRAIN_REWARD: 0.5,
      names.TRAIN_GRAD_NORM: 2,
    },
    {
      names.TRAIN_SAMPLES: 64,
      names.TRAIN_REWARD: 0.9,
      names.TRAIN_GRAD_NORM: 4,
    },
    {names.EVAL_HELDOUT: 0.8, names.YIELD_THROUGHPUT: 50.0},
  ]
  whole = throughput.TrainingYield()
  with metrics.Metrics([metrics.JsonlWriter(path)]) as sink:
    sink.subscribe(whole.observe)
    for step, row in enumerate(rows):
      sink.write(step, row)
  resumed = throughput.TrainingYield()
  for recorded in metrics.read_jsonl(path):
    resumed.observe(recorded)
  assert resumed.values() == whole.values()
  assert len(resumed.values()) == 4
