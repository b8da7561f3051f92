import json
import math
import subprocess
import sys
import threading

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from forge_jax import errors
from forge_jax.observe import metrics


class Deferred:
  """A value like a device array: reading it is an event."""

  def __init__(self, value, log):
    self._value = value
    self._log = log

  def __float__(self):
    self._log.append(self._value)
    return self._value


def write_steps(path, steps, value=0.0):
  with metrics.Metrics([metrics.JsonlWriter(path)]) as sink:
    for step in steps:
      sink.write(step, {"train/reward": step + value})


def test_values_are_read_one_step_late():
  read, events = [], []
  sink = metrics.Metrics()
  sink.subscribe(events.append)
  sink.write(1, {"train/loss": Deferred(10.0, read)})
  assert not read and not events
  sink.write(2, {"train/loss": Deferred(20.0, read)})
  assert read == [10.0]
  assert [(e.step, e.values) for e in events] == [(1, {"train/loss": 10.0})]
  sink.flush()
  sink.flush()
  assert read == [10.0, 20.0]
  assert [e.step for e in events] == [1, 2]


def test_numpy_scalars_become_floats():
  events = []
  sink = metrics.Metrics()
  sink.subscribe(events.append)
  values = {"a": np.float32(0.5), "b": np.array(3), "c": True}
  sink.write(1, values)
  values["a"] = 7.0  # the writer keeps a copy
  sink.flush()
  assert events[0].values == {"a": 0.5, "b": 3.0, "c": 1.0}
  assert all(type(v) is float for v in events[0].values.values())


@pytest.mark.parametrize("value", [np.zeros(3), "high", None])
def test_what_is_not_a_number_is_named(value):
  sink = metrics.Metrics()
  sink.write(4, {"train/loss": value})
  with pytest.raises(TypeError, match="'train/loss' of step 4"):
    sink.flush()


def test_an_event_carries_the_time_it_was_written():
  clock = iter([100.0, 200.0])
  events = []
  sink = metrics.Metrics(clock=lambda: next(clock))
  sink.subscribe(events.append)
  sink.write(1, {})
  sink.write(2, {})
  sink.flush()
  assert [e.time for e in events] == [100.0, 200.0]


def test_a_subscriber_can_leave_and_can_write():
  events = []
  sink = metrics.Metrics()

  def answer(event):
    if event.step == 1:
      sink.write(9, {"yield/j": 1.0})

  leave = sink.subscribe(answer)
  sink.subscribe(events.append)
  sink.write(1, {})
  sink.flush()
  leave()
  sink.write(1, {})
  sink.flush()
  sink.flush()
  assert [e.step for e in events] == [1, 9, 1]


def test_threads_lose_nothing():
  events = []
  sink = metrics.Metrics()
  sink.subscribe(events.append)

  def work(first):
    for step in range(first, first + 200):
      sink.write(step, {"a": step})

  threads = [threading.Thread(target=work, args=(n * 200,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  sink.flush()
  assert sorted(e.step for e in events) == list(range(800))


def test_jsonl_round_trip_and_strict_json(tmp_path):
  path = tmp_path / "deep" / "metrics.jsonl"
  with metrics.Metrics([metrics.JsonlWriter(path)], clock=lambda: 5.0) as sink:
    sink.write(1, {"train/reward": 0.25, "train/loss": math.nan})
    sink.write(2, {"train/loss": -math.inf})
  lines = path.read_text().splitlines()
  assert json.loads(lines[0]) == {
    "step": 1,
    "time": 5.0,
    "train/reward": 0.25,
    "train/loss": None,
  }
  assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
  first, second = metrics.read_jsonl(path)
  assert (first.step, first.time) == (1, 5.0)
  assert first.values["train/reward"] == 0.25
  assert math.isnan(first.values["train/loss"])
  assert math.isnan(second.values["train/loss"])


def test_jsonl_is_on_disk_after_every_event(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = metrics.JsonlWriter(path)
  writer.write(metrics.StepMetrics(1, 0.0, {"a": 1.0}))
  assert [e.step for e in metrics.read_jsonl(path)] == [1]
  writer.close()


def test_a_resumed_run_has_no_duplicates(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write_steps(path, range(6))
  with path.open("a") as file:
    file.write('{"step": 6, "ti')  # the crash
  sink = metrics.Metrics([metrics.JsonlWriter(path)])
  sink.resume_from(3)
  for step in (4, 5, 6):
    sink.write(step, {"train/reward": step + 0.5})
  sink.close()
  rewards = [e.values["train/reward"] for e in metrics.read_jsonl(path)]
  assert rewards == [0, 1, 2, 3, 4.5, 5.5, 6.5]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write_steps(path, range(3))
  writer = metrics.JsonlWriter(path)
  writer.resume_from(-1)
  writer.close()
  assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{]", "[1]", '{"time": 1.0}', '{"step": 1}'])
def test_a_bad_line_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  write_steps(path, [1])
  with path.open("a") as file:
    file.write(line + "\n")
  with pytest.raises(
    errors.ForgeError, match=r"metrics\.jsonl:2: not a metric"
  ):
    list(metrics.read_jsonl(path))


def tensorboard_events(folder):
  """The events of all files, oldest first; reads the record framing."""
  events = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def test_tensorboard_gets_every_value(tmp_path):
  with metrics.Metrics(
    [metrics.TensorBoardWriter(tmp_path)], clock=lambda: 5.0
  ) as sink:
    sink.write(1, {"train/reward": 0.25})
    sink.write(2, {"train/reward": 0.5, "lag/max": 1})
  found = [
    (e.step, v.tag, v.simple_value, e.wall_time)
    for e in tensorboard_events(tmp_path)
    for v in e.summary.value
  ]
  assert found == [
    (1, "train/reward", 0.25, 5.0),
    (2, "train/reward", 0.5, 5.0),
    (2, "lag/max", 1.0, 5.0),
  ]


def test_tensorboard_hides_what_is_repeated(tmp_path):
  sink = metrics.Metrics([metrics.TensorBoardWriter(tmp_path)])
  sink.resume_from(3)
  sink.write(4, {"a": 1.0})
  sink.close()
  starts = [
    e.step
    for e in tensorboard_events(tmp_path)
    if e.session_log.status == event_pb2.SessionLog.START
  ]
  assert starts == [4]


def test_wandb_must_be_installed(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(errors.ConfigError, match=r"forge-jax\[wandb\]"):
    metrics.WandbWriter("demo", "run-1", tmp_path, {})


def test_wandb_is_logged_to(monkeypatch, tmp_path):
  calls = []

  class Wandb:
    @staticmethod
    def init(**kwargs):
      calls.append(kwargs)
      return Wandb()

    def log(self, values, step):
      calls.append((step, values))

    def finish(self):
      calls.append("finish")

  monkeypatch.setitem(sys.modules, "wandb", Wandb)
  writer = metrics.WandbWriter("demo", "run-1", tmp_path, {"seed": 1})
  with metrics.Metrics([writer]) as sink:
    sink.write(3, {"a": 1})
  assert calls[0]["id"] == "run-1" and calls[0]["resume"] == "allow"
  assert calls[0]["config"] == {"seed": 1}
  assert calls[1:] == [(3, {"a": 1.0}), "finish"]


def test_no_jax_is_imported():
  code = "import sys, forge_jax.observe.metrics; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "False"
