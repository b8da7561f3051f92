"""The window's rules, against an oracle that is obviously right."""

import json
import random

import pytest

from forge_jax import errors
from forge_jax.pool import windowed_fifo


class Oracle:
  """Windowed FIFO by definition: one status for every item there ever was."""

  def __init__(self, config):
    self.config = config
    self.width = {
      "windowed": min(config.window, config.in_flight),
      "fifo": 1,
      "greedy": config.in_flight,
    }[config.policy]
    self.status = []  # "running", "completed", "consumed" or "again"
    self.head = 0

  @property
  def submitted(self):
    return len(self.status)

  def having(self, status):
    indices = range(self.head, self.submitted)
    return [i for i in indices if self.status[i] == status]

  def may_start(self, index, trained):
    config = self.config
    step = index // config.groups_per_step
    return (
      index - self.head < config.in_flight and step - trained <= config.max_lag
    )

  def admissible(self, trained):
    later = range(self.submitted, self.submitted + self.config.in_flight + 1)
    candidates = [*self.having("again"), *later]
    return sum(self.may_start(i, trained) for i in candidates)

  def submit(self):
    for index in self.having("again"):
      self.status[index] = "running"
      return index
    self.status.append("running")
    return self.submitted - 1

  def takeable(self):
    return [i for i in self.having("completed") if i < self.head + self.width]

  def take(self, count):
    taken = []
    while len(taken) < count and self.takeable():
      taken.append(self.takeable()[0])
      self.status[taken[-1]] = "consumed"
      while self.head < self.submitted and self.status[self.head] == "consumed":
        self.head += 1
    return taken

  def available(self):
    before = self.status[:], self.head
    count = len(self.take(self.submitted))
    self.status, self.head = before
    return count


def assert_agree(fifo, oracle, trained):
  assert fifo.head == oracle.head
  assert fifo.submitted == oracle.submitted
  assert fifo.completed == len(oracle.having("completed"))
  assert fifo.in_progress == len(oracle.having("running"))
  assert fifo.takeable() == oracle.takeable()
  assert fifo.available() == oracle.available()
  assert fifo.admissible(trained) == oracle.admissible(trained)


def restart(fifo, oracle):
  """The scheduler through JSON; what was in progress is lost on the way."""
  for index in oracle.having("running"):
    oracle.status[index] = "again"
  again = windowed_fifo.WindowedFifo(fifo.config)
  again.restore(json.loads(json.dumps(fifo.state())))
  return again


CONFIGS = [
  windowed_fifo.WindowConfig("windowed", 8, 4, 2, 2),
  windowed_fifo.WindowConfig("windowed", 16, 5, 1, 8),
  windowed_fifo.WindowConfig("windowed", 4, 9, 100, 1),
  windowed_fifo.WindowConfig("fifo", 6, 4, 3, 2),
  windowed_fifo.WindowConfig("greedy", 8, 2, 1, 4),
  windowed_fifo.WindowConfig("windowed", 4, 3, 0, 4),
  windowed_fifo.WindowConfig("windowed", 3, 2, 1, 5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_long_random_run_agrees_with_the_oracle(config):
  rng = random.Random(str(config))
  fifo, oracle = windowed_fifo.WindowedFifo(config), Oracle(config)
  trained = taken_since = 0
  batch = config.groups_per_step
  for number in range(20_000):
    # Few events of a kind in a row, so that full and empty windows both occur.
    kind = rng.choices(
      ["submit", "complete", "take", "train", "release", "restart"],
      [5, 5, 4, 3, 0.1, 0.05],
    )[0]
    running = oracle.having("running")
    if kind == "submit" and oracle.admissible(trained):
      assert fifo.submit() == oracle.submit()
    elif kind == "complete" and running:
      index = rng.choice(running)
      fifo.complete(index)
      oracle.status[index] = "completed"
    elif kind == "take" and oracle.available():
      count = rng.randint(1, oracle.available())
      taken = fifo.take(count)
      assert taken == oracle.take(count) == sorted(taken)
      taken_since += count
    elif kind == "train" and taken_since >= batch:
      taken_since -= batch
      trained += 1
    elif kind == "release" and running:
      index = rng.choice(running)
      fifo.release(index)
      oracle.status[index] = "again"
    elif kind == "restart":
      fifo = restart(fifo, oracle)
    if number % 3 == 0:
      assert_agree(fifo, oracle, trained)
  assert_agree(fifo, oracle, trained)
  assert fifo.head > 1000


def started(count, **config):
  fifo = windowed_fifo.WindowedFifo(
    windowed_fifo.WindowConfig(**{"groups_per_step": 1, "max_lag": 99} | config)
  )
  assert [fifo.submit() for _ in range(count)] == list(range(count))
  return fifo


def test_the_worked_figure():
  """N = 8, W = 4: with 0-10 but 7 consumed, only 7 may be taken."""
  fifo = started(8, in_flight=8, window=4)
  for index in range(7):
    fifo.complete(index)
  assert fifo.take(7) == list(range(7))
  assert [fifo.submit() for _ in range(7)] == list(range(8, 15))
  for index in range(8, 15):
    fifo.complete(index)
  assert fifo.takeable() == [8, 9, 10]  # out-of-order tolerance W - 1 = 3
  assert fifo.take(3) == [8, 9, 10]
  # 11 to 14 are complete, yet blocked by the straggler.
  assert (fifo.head, fifo.completed, fifo.takeable()) == (7, 4, [])
  assert fifo.available() == 0 and fifo.admissible(0) == 0
  with pytest.raises(errors.PoolError, match=r"1 groups .* 0 are available"):
    fifo.take(1)
  fifo.complete(7)
  assert fifo.takeable() == [7]
  assert fifo.take(1) == [7]
  assert fifo.takeable() == [11, 12, 13, 14]


def test_the_lag_of_the_worked_figure_is_ten_items():
  """Item 7 begins with 0 consumed and ends as the last of 0 to 10."""
  fifo = started(8, in_flight=8, window=4)
  consumed_before = 0  # when item 7 was submitted
  order = []
  for index in range(7):
    fifo.complete(index)
  order += fifo.take(7)
  for _ in range(7):
    fifo.complete(fifo.submit())
  order += fifo.take(fifo.available())
  fifo.complete(7)
  order += fifo.take(1)
  assert order.index(7) - consumed_before == 10


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_bounds_of_the_docstring_hold(config):
  """Of items consumed in between, of optimizer steps, of being overtaken."""
  rng = random.Random(0)
  fifo = windowed_fifo.WindowedFifo(config)
  trained = consumed = 0
  begun = {}  # index -> (items consumed, trained steps) at its submission
  running = set()
  items, steps, ahead = [], [], []
  for number in range(4000):
    while fifo.admissible(trained):
      index = fifo.submit()
      begun[index] = (consumed, trained)
      running.add(index)
    # Half of the time the oldest item is a straggler.
    straggle = number % 40 < 20 and len(running) > 1
    index = rng.choice(sorted(running)[straggle:])
    running.remove(index)
    fifo.complete(index)
    while fifo.available():
      ahead.append(-fifo.head)
      (index,) = fifo.take(1)
      ahead[-1] += index
      at, version = begun.pop(index)
      items.append(consumed - at)
      steps.append(trained - version)
      consumed += 1
      trained = consumed // config.groups_per_step
  n, w, p = config.in_flight, config.width, config.groups_per_step
  assert max(ahead) <= w - 1
  assert max(items) <= n + w - 2
  assert max(steps) <= config.max_lag + -(-(w - 1) // p)
  if config.max_lag == 100:  # nothing but the position bounds the lag
    assert max(ahead) == w - 1
    assert max(items) == n + w - 2


def test_fifo_takes_in_order_only():
  fifo = started(4, policy="fifo", in_flight=4, window=4)
  for index in (3, 2, 1):
    fifo.complete(index)
    assert fifo.available() == 0
  fifo.complete(0)
  assert fifo.takeable() == [0] and fifo.available() == 4
  assert fifo.take(4) == [0, 1, 2, 3]


def test_greedy_takes_whatever_is_complete():
  fifo = started(4, policy="greedy", in_flight=4, window=1)
  fifo.complete(3)
  assert fifo.take(1) == [3]
  assert fifo.head == 0


def test_completing_twice_changes_nothing():
  fifo = started(2, in_flight=2)
  fifo.complete(0)
  fifo.complete(0)
  assert fifo.take(1) == [0]
  fifo.complete(0)
  assert (fifo.completed, fifo.available()) == (0, 0)


def test_mistakes_are_refused():
  fifo = started(2, in_flight=2)
  with pytest.raises(errors.PoolError, match="group 2 may not be submitted"):
    fifo.submit()
  with pytest.raises(errors.PoolError, match="group 2 is not in progress"):
    fifo.complete(2)
  fifo.release(0)
  with pytest.raises(errors.PoolError, match="group 0 is not in progress"):
    fifo.complete(0)
  fifo.complete(1)
  with pytest.raises(errors.PoolError, match="group 1 is completed already"):
    fifo.release(1)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"policy": "lifo"}, "'lifo'"),
    ({"in_flight": 0}, "in_flight is 0"),
    ({"window": 0}, "window is 0"),
    ({"max_lag": -1}, "max_lag is -1"),
    ({"groups_per_step": 0}, "groups_per_step is 0"),
  ],
)
def test_bad_configs_are_refused(fields, message):
  with pytest.raises(errors.ConfigError, match=message):
    windowed_fifo.WindowConfig(**fields)


def test_a_run_of_a_given_length_admits_no_more_groups():
  scheduler = windowed_fifo.WindowedFifo(
    windowed_fifo.WindowConfig(
      policy="greedy", in_flight=8, max_lag=5, groups_per_step=2, total=3
    )
  )
  while scheduler.admissible(0):
    scheduler.submit()
  assert scheduler.submitted == 3
