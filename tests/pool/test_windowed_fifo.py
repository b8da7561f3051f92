"""The window's rules, against an oracle that is obviously right."""

import dataclasses
import json
import random

import pytest

from forge_jax import errors
from forge_jax.pool import progress as progress_lib
from forge_jax.pool import window as window_lib
from forge_jax.pool import windowed_fifo


class Oracle:
  """Windowed FIFO by definition: one status for every item there ever was.

  An item is "running", "completed", "consumed" or "again"; `tasks` are those
  to be submitted before new ones, as (number, attempt).
  """

  def __init__(self, config):
    self.config = config
    self.width = config.width
    self.status = []
    self.task = []  # (number, attempt) of each item
    self.begun = []  # trained steps at its submission
    self.tasks = []
    self.next_number = 0
    self.head = 0
    self.dropped = 0

  @property
  def submitted(self):
    return len(self.status)

  def having(self, status):
    indices = range(self.head, self.submitted)
    return [i for i in indices if self.status[i] == status]

  def may_start(self, index, trained):
    config = self.config
    place = index - self.dropped  # among the items that are trained
    if config.max_lag is not None:
      step = place // config.groups_per_step
      if step - trained > config.max_lag:
        return False
    if config.total is not None and place >= config.total:
      return False
    return index - self.head < config.in_flight

  def admissible(self, trained):
    later = range(self.submitted, self.submitted + self.config.in_flight + 1)
    candidates = [*self.having("again"), *later]
    return sum(self.may_start(i, trained) for i in candidates)

  def submit(self, trained):
    again = self.having("again")
    if not again:
      again = [self.submitted]
      for column in (self.status, self.task, self.begun):
        column.append(None)
    if self.tasks:
      self.tasks.sort()
      task = self.tasks.pop(0)
    else:
      task = self.next_number, 0
      self.next_number += 1
    index = again[0]
    self.status[index], self.task[index] = "running", task
    self.begun[index] = trained
    return (index, *task, trained)

  def give_back(self, index):
    self.status[index] = "again"
    self.tasks.append(self.task[index])

  def takeable(self):
    return [i for i in self.having("completed") if i < self.head + self.width]

  def consume(self):
    """Consumes one item; returns its ticket."""
    index = self.takeable()[0]
    self.status[index] = "consumed"
    while self.head < self.submitted and self.status[self.head] == "consumed":
      self.head += 1
    return (index, *self.task[index], self.begun[index])

  def take(self, count, trained):
    config = self.config
    taken, expired = [], []
    while len(taken) < count and self.takeable():
      ticket = self.consume()
      _, _, attempt, begun = ticket
      if (
        config.over_lag == "drop"
        and trained - begun > config.max_lag
        and attempt < config.attempts - 1
      ):
        self.drop(ticket, True)
        expired.append(ticket)
      else:
        taken.append(ticket)
    return taken, expired

  def drop(self, ticket, again):
    _, number, attempt, _ = ticket
    self.dropped += 1
    again = again and attempt < self.config.attempts - 1
    if again:
      self.tasks.append((number, attempt + 1))
    return again

  def available(self):
    head, start = self.head, self.head
    before = self.status[start:]
    count = 0
    while self.takeable():
      self.consume()
      count += 1
    self.head, self.status[start:] = head, before
    return count

  def restart(self):
    """Loses what is in progress, and that the last items were handed out."""
    for index in self.having("running"):
      self.give_back(index)
    while self.status and self.status[-1] == "again":
      for column in (self.status, self.task, self.begun):
        column.pop()


def assert_agree(fifo, oracle, trained):
  assert fifo.head == oracle.head
  assert fifo.submitted == oracle.submitted
  assert fifo.completed == len(oracle.having("completed"))
  assert fifo.in_progress == len(oracle.having("running"))
  assert fifo.takeable() == oracle.takeable()
  assert fifo.available() == oracle.available()
  assert fifo.admissible(trained) == oracle.admissible(trained)


# Events and how often they come.
KINDS = {
  "submit": 5,
  "complete": 5,
  "take": 4,
  "train": 3,
  "drop": 0.3,
  "release": 0.1,
  "restart": 0.05,
  "resize": 0.05,
}


class Run:
  """A scheduler and an oracle that live through the same events."""

  def __init__(self, config):
    self.rng = random.Random(str(config))
    self.config = config
    self.fifo = windowed_fifo.WindowedFifo(config)
    self.oracle = Oracle(config)
    self.progress = progress_lib.Progress()
    self.trained = self.taken = 0

  def live(self, steps):
    # Few events of a kind in a row, so that full and empty windows both occur.
    kinds = self.rng.choices(list(KINDS), list(KINDS.values()), k=steps)
    for number, kind in enumerate(kinds):
      getattr(self, kind)()
      if number % 3 == 0:
        assert_agree(self.fifo, self.oracle, self.trained)
    assert_agree(self.fifo, self.oracle, self.trained)

  def running(self):
    running = self.oracle.having("running")
    return self.rng.choice(running) if running else None

  def submit(self):
    if self.oracle.admissible(self.trained):
      ticket = self.fifo.submit(self.trained)
      assert ticket == self.oracle.submit(self.trained)

  def complete(self):
    index = self.running()
    if index is not None:
      self.fifo.complete(index)
      self.oracle.status[index] = "completed"

  def take(self, drop=False):
    count = self.oracle.available()
    if not count:
      return
    count = self.rng.randint(1, count)
    taken, expired = self.fifo.take(count, self.trained)
    assert (taken, expired) == self.oracle.take(count, self.trained)
    assert taken == sorted(taken)
    for ticket in expired:
      self.progress.drop(ticket, True)
    for ticket in taken:
      if drop:
        again = self.rng.random() < 0.5
        retried = self.fifo.drop(ticket, again)
        assert retried == self.oracle.drop(ticket, again)
        self.progress.drop(ticket, retried)
      else:
        self.progress.train(ticket)
        self.taken += 1

  def drop(self):
    self.take(drop=True)

  def train(self):
    if self.taken >= self.config.groups_per_step:
      self.taken -= self.config.groups_per_step
      self.trained += 1

  def release(self):
    index = self.running()
    if index is not None:
      self.fifo.release(index)
      self.oracle.give_back(index)

  def restart(self):
    """The progress goes through JSON; what is in progress is lost."""
    progress = progress_lib.Progress.restore(
      json.loads(json.dumps(self.progress.state()))
    )
    self.oracle.restart()
    completed = [
      progress_lib.Ticket(i, *self.oracle.task[i], self.oracle.begun[i])
      for i in self.oracle.having("completed")
    ]
    self.fifo = windowed_fifo.WindowedFifo(self.config, progress, completed)
    self.oracle.width = self.config.width

  def resize(self):
    self.oracle.width = self.rng.randint(1, self.config.in_flight)
    self.fifo.resize(self.oracle.width)


CONFIGS = [
  window_lib.WindowConfig("windowed", 8, 4, 2, "train", 3, 2),
  window_lib.WindowConfig("windowed", 16, 5, 1, "drop", 2, 8),
  window_lib.WindowConfig("windowed", 4, 9, 100, "train", 3, 1),
  window_lib.WindowConfig("fifo", 6, 4, 3, "drop", 3, 2),
  window_lib.WindowConfig("greedy", 8, 2, 1, "drop", 4, 4),
  window_lib.WindowConfig("windowed", 4, 3, 0, "train", 1, 4),
  window_lib.WindowConfig("windowed", 3, 2, 1, "train", 2, 5),
  window_lib.WindowConfig("windowed", 8, 0.5, None, "train", 3, 2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_long_random_run_agrees_with_the_oracle(config, full):
  """A million events over all configurations, fewer unless `--full`."""
  events = (1_000_000 if full else 80_000) // len(CONFIGS)
  run = Run(config)
  run.live(events)
  assert run.fifo.head > events // 40
  assert run.oracle.dropped > events // 400
  assert run.progress.consumed.head == run.fifo.head


def started(count, **config):
  fifo = windowed_fifo.WindowedFifo(
    window_lib.WindowConfig(**{"groups_per_step": 1, "max_lag": 99} | config)
  )
  assert submit(fifo, count) == list(range(count))
  return fifo


def submit(fifo, count):
  return [fifo.submit().index for _ in range(count)]


def take(fifo, count):
  taken, expired = fifo.take(count)
  assert not expired
  return [ticket.index for ticket in taken]


def test_the_worked_figure():
  """N = 8, W = 4: with 0-10 but 7 consumed, only 7 may be taken."""
  fifo = started(8, in_flight=8, window=4)
  for index in range(7):
    fifo.complete(index)
  assert take(fifo, 7) == list(range(7))
  assert submit(fifo, 7) == list(range(8, 15))
  for index in range(8, 15):
    fifo.complete(index)
  assert fifo.takeable() == [8, 9, 10]  # out-of-order tolerance W - 1 = 3
  assert take(fifo, 3) == [8, 9, 10]
  # 11 to 14 are complete, yet blocked by the straggler.
  assert (fifo.head, fifo.completed, fifo.takeable()) == (7, 4, [])
  assert fifo.available() == 0 and fifo.admissible(0) == 0
  with pytest.raises(errors.PoolError, match=r"1 groups .* 0 are available"):
    take(fifo, 1)
  fifo.complete(7)
  assert fifo.takeable() == [7]
  assert take(fifo, 1) == [7]
  assert fifo.takeable() == [11, 12, 13, 14]


def test_the_lag_of_the_worked_figure_is_ten_items():
  """Item 7 begins with 0 consumed and ends as the last of 0 to 10."""
  fifo = started(8, in_flight=8, window=4)
  consumed_before = 0  # when item 7 was submitted
  order = []
  for index in range(7):
    fifo.complete(index)
  order += take(fifo, 7)
  for _ in range(7):
    fifo.complete(fifo.submit().index)
  order += take(fifo, fifo.available())
  fifo.complete(7)
  order += take(fifo, 1)
  assert order.index(7) - consumed_before == 10


@pytest.mark.parametrize(
  "config", [dataclasses.replace(c, over_lag="train") for c in CONFIGS], ids=str
)
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
      index = fifo.submit(trained).index
      begun[index] = (consumed, trained)
      running.add(index)
    # Half of the time the oldest item is a straggler.
    straggle = number % 40 < 20 and len(running) > 1
    index = rng.choice(sorted(running)[straggle:])
    running.remove(index)
    fifo.complete(index)
    while fifo.available():
      ahead.append(-fifo.head)
      [index] = take(fifo, 1)
      ahead[-1] += index
      at, version = begun.pop(index)
      items.append(consumed - at)
      steps.append(trained - version)
      consumed += 1
      trained = consumed // config.groups_per_step
  n, w, p = config.capacity, config.width, config.groups_per_step
  assert max(ahead) <= w - 1
  assert max(items) <= n + w - 2
  if config.max_lag is not None:
    assert max(steps) <= config.max_lag + -(-(w - 1) // p)
  if config.max_lag in (None, 100):  # nothing but the position bounds the lag
    assert max(ahead) == w - 1
    assert max(items) == n + w - 2


def test_fifo_takes_in_order_only():
  fifo = started(4, policy="fifo", in_flight=4, window=4)
  for index in (3, 2, 1):
    fifo.complete(index)
    assert fifo.available() == 0
  fifo.complete(0)
  assert fifo.takeable() == [0] and fifo.available() == 4
  assert take(fifo, 4) == [0, 1, 2, 3]


def test_greedy_takes_whatever_is_complete():
  fifo = started(4, policy="greedy", in_flight=4, window=1)
  fifo.complete(3)
  assert take(fifo, 1) == [3]
  assert fifo.head == 0


def test_completing_twice_changes_nothing():
  fifo = started(2, in_flight=2)
  fifo.complete(0)
  fifo.complete(0)
  assert take(fifo, 1) == [0]
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
    ({"over_lag": "wait"}, "'wait'"),
    ({"in_flight": 0}, "in_flight is 0"),
    ({"in_flight": 0.5}, "in_flight is the share 0.5, but there is no total"),
    ({"window": 0}, "window is 0"),
    ({"window": 2.5}, "window is 2.5"),
    ({"window": -0.1}, "window is -0.1"),
    ({"attempts": 0}, "attempts is 0"),
    ({"max_lag": -1}, "max_lag is -1"),
    ({"groups_per_step": 0}, "groups_per_step is 0"),
  ],
)
def test_bad_configs_are_refused(fields, message):
  with pytest.raises(errors.ConfigError, match=message):
    window_lib.WindowConfig(**fields)


def test_a_run_of_a_given_length_admits_no_more_groups():
  scheduler = windowed_fifo.WindowedFifo(
    window_lib.WindowConfig(
      policy="greedy", in_flight=8, max_lag=5, groups_per_step=2, total=3
    )
  )
  while scheduler.admissible(0):
    scheduler.submit()
  assert scheduler.submitted == 3


@pytest.mark.parametrize(
  "window, in_flight, expected",
  [(0.3, 8192, 2458), (4096, 8192, 4096), (1.0, 7, 7), (1, 7, 1), (0.01, 7, 1)],
)
def test_a_window_is_a_number_or_a_share_of_n(window, in_flight, expected):
  config = window_lib.WindowConfig(window=window, in_flight=in_flight)
  assert config.width == expected
  wide = dataclasses.replace(config, policy="greedy")
  assert wide.width == in_flight
  assert dataclasses.replace(config, policy="fifo").width == 1


def test_n_is_a_number_or_a_share_of_the_run():
  config = window_lib.WindowConfig(in_flight=0.25, total=64, window=0.5)
  assert (config.capacity, config.width) == (16, 8)


def overtaken(**config):
  """Item 0 is begun at step 0 and completed when 3 steps are trained."""
  fifo = started(
    4, in_flight=4, window=4, **{"max_lag": 1, "over_lag": "drop"} | config
  )
  fifo.complete(0)
  return fifo


def test_what_is_over_the_version_bound_is_trained_or_dropped():
  fifo = overtaken(over_lag="train")
  [ticket], expired = fifo.take(1, step=3)
  assert (ticket.index, fifo.lag(ticket, 3), expired) == (0, 2, [])
  fifo = overtaken()
  assert fifo.take(1, step=1) == ([(0, 0, 0, 0)], [])  # just in time
  fifo = overtaken()
  taken, [ticket] = fifo.take(1, step=3)
  assert (taken, ticket.index) == ([], 0)
  # The head has moved on, and the task is the next new item.
  assert fifo.head == 1
  assert fifo.submit(3) == (4, 0, 1, 3)


def test_a_slow_task_is_not_dropped_for_ever():
  fifo = overtaken(attempts=2)
  fifo.take(1, step=3)
  assert fifo.submit(3).attempt == 1
  for index in (1, 2, 3):
    fifo.complete(index)
  fifo.take(3, step=1)
  fifo.complete(4)
  taken, expired = fifo.take(1, step=9)
  assert ([t.index for t in taken], expired) == ([4], [])


def test_what_is_dropped_makes_room_under_version_and_total():
  fifo = started(2, in_flight=9, window=9, max_lag=0, groups_per_step=2)
  assert fifo.admissible(0) == 0
  fifo.complete(1)
  [ticket], _ = fifo.take(1)
  assert not fifo.drop(ticket, again=False)
  assert fifo.admissible(0) == 1
  assert fifo.submit() == (2, 2, 0, 0)
  assert fifo.admissible(0) == 0


def test_a_drop_that_a_crash_forgot_is_made_again():
  """Task 0 has a second group, item 3: so its first one was dropped."""
  config = window_lib.WindowConfig(in_flight=8, window=8, max_lag=None)
  completed = [progress_lib.Ticket(0, 0, 0, 0), progress_lib.Ticket(3, 0, 1, 0)]
  fifo = windowed_fifo.WindowedFifo(config, completed=completed)
  taken, expired = fifo.take(1)
  assert (taken, expired) == (completed[1:], completed[:1])
  assert [fifo.submit()[:3] for _ in range(3)] == [
    (1, 1, 0),
    (2, 2, 0),
    (4, 3, 0),
  ]


def test_a_wider_window_shows_what_waits_beyond_it():
  fifo = started(8, in_flight=8, window=2)
  for index in (1, 3, 5):
    fifo.complete(index)
  assert (fifo.takeable(), fifo.available()) == ([1], 1)
  fifo.resize(6)
  assert (fifo.takeable(), fifo.available()) == ([1, 3, 5], 3)
  fifo.resize(4)
  assert (fifo.takeable(), fifo.available()) == ([1, 3], 2)
  with pytest.raises(errors.PoolError, match=r"window of 9 is not in 1\.\.8"):
    fifo.resize(9)
