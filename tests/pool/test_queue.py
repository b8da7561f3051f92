"""Host and trainer meet: order, durability, restart, failure."""

import asyncio
import dataclasses
import json
import random
import threading

import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import drift as drift_lib
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import records, store
from forge_jax.pool import window as window_lib


@pytest.fixture
def pool(tmp_path):
  with store.DataPool.open(tmp_path / "pool") as opened:
    yield opened


def make_queue(pool, **config):
  defaults = {"in_flight": 8, "window": 4, "max_lag": 99, "groups_per_step": 2}
  return queue_lib.GroupQueue(
    pool, window_lib.WindowConfig(**defaults | config)
  )


def complete(queue, *indices):
  for index in indices:
    queue.complete(sample_groups.make_group(index, seed=index))


async def admit(queue, count):
  """Admits `count` groups, which must not have to wait."""
  tickets = [await asyncio.wait_for(queue.admit(), 10) for _ in range(count)]
  return [ticket.index for ticket in tickets]


async def assert_admits_nothing(queue):
  with pytest.raises(TimeoutError):
    await asyncio.wait_for(queue.admit(), 0.02)


def indices(groups):
  return [group.index for group in groups]


async def test_batches_come_in_ascending_order_out_of_the_store(pool):
  queue = make_queue(pool)
  assert await admit(queue, 8) == list(range(8))
  await assert_admits_nothing(queue)
  complete(queue, 3, 1, 0, 7)
  groups = queue.take(2)
  assert indices(groups) == [0, 1]
  sample_groups.assert_same(groups[1], sample_groups.make_group(1, seed=1))
  # 2 is the head: of 3 and 7 only 3 lies in the window.
  with pytest.raises(errors.PoolError, match=r"head 2.* completed 1"):
    queue.take(2, timeout=0.01)
  complete(queue, 2)
  assert indices(queue.take(2, timeout=10)) == [2, 3]


async def test_a_group_is_durable_before_it_is_visible(pool, monkeypatch):
  queue = make_queue(pool)
  await admit(queue, 1)
  append = pool.append

  def look_and_append(group):
    assert queue.stats()["completed"] == 0
    append(group)
    assert group.index in pool and queue.stats()["completed"] == 0

  monkeypatch.setattr(pool, "append", look_and_append)
  complete(queue, 0)
  assert queue.stats()["completed"] == 1


async def test_what_the_store_refuses_is_not_visible(pool, monkeypatch):
  def refuse(group):
    raise errors.PoolError("disk full")

  queue = make_queue(pool)
  await admit(queue, 1)
  monkeypatch.setattr(pool, "append", refuse)
  with pytest.raises(errors.PoolError, match="disk full"):
    complete(queue, 0)
  assert queue.stats()["completed"] == 0


async def test_a_group_that_was_not_admitted_is_not_stored(pool):
  queue = make_queue(pool)
  with pytest.raises(errors.PoolError, match="group 0 is not in progress"):
    complete(queue, 0)
  assert pool.indices() == []


async def test_completing_twice_trains_once(pool):
  queue = make_queue(pool)
  await admit(queue, 2)
  complete(queue, 0, 0, 1)
  assert indices(queue.take(2)) == [0, 1]
  complete(queue, 0)
  assert queue.stats()["available"] == 0


async def test_a_straggler_with_everything_else_consumed_holds_up_nothing(pool):
  """Claims are made while waiting, so that the head can move on."""
  queue = make_queue(pool, policy="greedy", in_flight=4, groups_per_step=3)
  await admit(queue, 4)
  complete(queue, 1, 2, 3)
  assert indices(queue.take(3)) == [1, 2, 3]
  complete(queue, 0)
  await assert_admits_nothing(queue)
  with pytest.raises(errors.PoolError, match="no batch of 3"):
    queue.take(3, timeout=0.01)
  assert await admit(queue, 4) == [4, 5, 6, 7]
  complete(queue, 5, 7)
  assert indices(queue.take(3, timeout=10)) == [0, 5, 7]


async def test_take_waits_for_the_host_and_admit_for_the_trainer(pool):
  queue = make_queue(pool, policy="fifo", in_flight=3, max_lag=1)
  trained = []

  def train():
    for step in range(1, 21):
      trained.extend(indices(queue.take(2, timeout=30)))
      queue.commit(step)

  async def roll_out():
    while True:
      index = (await queue.admit()).index
      await asyncio.sleep(0)
      await asyncio.to_thread(complete, queue, index)

  thread = threading.Thread(target=train)
  hosts = [asyncio.create_task(roll_out()) for _ in range(3)]
  thread.start()
  await asyncio.to_thread(thread.join)
  for host in hosts:
    host.cancel()
  await asyncio.gather(*hosts, return_exceptions=True)
  assert trained == list(range(40))


async def test_max_lag_0_is_strictly_synchronous(pool):
  queue = make_queue(pool, max_lag=0)
  for step in range(4):
    expected = [2 * step, 2 * step + 1]
    assert await admit(queue, 2) == expected
    await assert_admits_nothing(queue)
    complete(queue, *reversed(expected))
    assert indices(queue.take(2)) == expected
    await assert_admits_nothing(queue)  # taken, but not trained
    queue.commit(step + 1)


async def test_a_commit_admits_those_who_wait(pool):
  queue = make_queue(pool, max_lag=0)
  await admit(queue, 2)
  complete(queue, 0, 1)
  queue.take(2)
  waiting = asyncio.create_task(queue.admit())
  await asyncio.sleep(0.01)
  assert not waiting.done()
  await asyncio.to_thread(queue.commit, 1)
  assert (await asyncio.wait_for(waiting, 10)).index == 2


async def test_commits_are_checked(pool):
  queue = make_queue(pool)
  with pytest.raises(errors.PoolError, match=r"step 1 .* 0 batches"):
    queue.commit(1)
  await admit(queue, 2)
  complete(queue, 0, 1)
  queue.take(2)
  with pytest.raises(errors.PoolError, match=r"step 2 .*: 0 steps are"):
    queue.commit(2)
  queue.commit(1)


async def test_what_is_given_back_is_admitted_next(pool):
  queue = make_queue(pool)
  await admit(queue, 3)
  queue.release(1)
  assert await admit(queue, 2) == [1, 3]


async def test_a_cancelled_admission_takes_no_index(pool):
  queue = make_queue(pool, in_flight=2)
  await admit(queue, 2)
  await assert_admits_nothing(queue)
  complete(queue, 0)
  queue.take(1)
  assert await admit(queue, 1) == [2]


async def test_a_host_failure_reaches_the_waiting_trainer(pool):
  queue = make_queue(pool)
  failure = errors.GatewayError("gone")
  timer = threading.Timer(0.05, queue.fail, (failure,))
  timer.start()
  with pytest.raises(errors.GatewayError) as caught:
    queue.take(1, timeout=30)
  timer.join()
  assert caught.value is failure
  with pytest.raises(errors.GatewayError):
    await queue.admit()


async def test_closing_ends_all_waiting(pool):
  queue = make_queue(pool, in_flight=2)
  await admit(queue, 2)
  waiting = asyncio.create_task(queue.admit())
  await asyncio.sleep(0)
  taking = asyncio.create_task(asyncio.to_thread(queue.take, 1))
  queue.close()
  queue.close()
  for task in (waiting, taking):
    with pytest.raises(errors.PoolError, match="closed"):
      await asyncio.wait_for(task, 10)


async def run_to_crash(pool):
  """Two steps committed, one taken and lost, and others at every stage."""
  queue = make_queue(pool)
  await admit(queue, 8)
  complete(queue, 0, 1, 2, 4)
  queue.take(2)
  queue.commit(1)
  assert await admit(queue, 2) == [8, 9]
  assert indices(queue.take(2)) == [2, 4]
  queue.commit(2)
  state = json.loads(json.dumps(queue.state()))
  complete(queue, 3, 5, 9)
  assert indices(queue.take(2)) == [3, 5]  # the step that was lost
  queue.commit(3)
  return state  # 6, 7 and 8 were in progress


async def test_a_restart_resubmits_exactly_the_missing(pool):
  state = await run_to_crash(pool)
  assert state == {
    "curation": {
      "counts": {"queue/over_lag": 0, "queue/expired": 0},
      "memory": {},
    },
    "trained_steps": 2,
    "consumed": {"head": 3, "beyond": [4]},
    "finished": {"head": 3, "beyond": [4]},
    "dropped": 0,
    "retries": [],
  }
  queue = make_queue(pool)
  queue.restore(state)
  assert queue.state() == state
  assert await admit(queue, 4) == [6, 7, 8, 10]
  # The lost step is trained again, 9 waits outside the window.
  assert indices(queue.take(2)) == [3, 5]
  queue.commit(3)
  complete(queue, 8, 7, 6, 10)
  assert indices(queue.take(5)) == [6, 7, 8, 9, 10]


async def test_without_a_checkpoint_all_that_is_stored_trains_again(pool):
  await run_to_crash(pool)
  queue = make_queue(pool)
  assert await admit(queue, 2) == [6, 7]
  # 8 is beyond the eight groups in flight that head 0 allows.
  await assert_admits_nothing(queue)
  # The very batches of before, although 0 to 5 are all there.
  assert [indices(queue.take(2)) for _ in range(3)] == [[0, 1], [2, 4], [3, 5]]
  complete(queue, 6, 7)
  assert indices(queue.take(3)) == [6, 7, 9]


async def test_what_was_taken_and_not_committed_is_not_in_the_state(pool):
  queue = make_queue(pool)
  await admit(queue, 6)
  complete(queue, *range(5))
  queue.take(2)
  queue.take(2)
  with pytest.raises(errors.PoolError):
    queue.take(2, timeout=0)  # claims 4 and waits for 5
  queue.commit(1)
  state = queue.state()
  assert state["trained_steps"] == 1
  assert state["consumed"] == {"head": 2, "beyond": []}
  again = make_queue(pool)
  again.restore(state)
  with pytest.raises(errors.PoolError, match="step 2 has claimed 2 groups"):
    again.take(3)
  assert indices(again.take(2)) == [2, 3]
  assert await admit(again, 1) == [5]
  complete(again, 5)
  assert indices(again.take(2)) == [4, 5]


async def test_a_group_over_the_version_bound_is_dropped_and_comes_again(pool):
  queue = make_queue(
    pool, policy="greedy", in_flight=6, max_lag=1, over_lag="drop"
  )
  await admit(queue, 4)
  for step, pair in enumerate([(1, 2), (3, 4)], 1):
    complete(queue, *pair)
    assert indices(queue.take(2, timeout=10)) == list(pair)
    queue.commit(step)
    await admit(queue, 1 if step == 1 else 0)
  complete(queue, 0)  # begun two steps ago
  with pytest.raises(errors.PoolError, match="no batch"):
    queue.take(2, timeout=0)
  assert queue.stats()["expired"] == 1
  state = queue.state()
  assert (state["dropped"], state["retries"]) == (0, [])  # not committed
  assert await asyncio.wait_for(queue.admit(), 10) == (5, 0, 1, 2)
  assert (await queue.admit())[:3] == (6, 5, 0)
  complete(queue, 5, 6)
  assert indices(queue.take(2, timeout=10)) == [5, 6]
  queue.commit(3)
  continued = make_queue(pool, policy="greedy", max_lag=1, over_lag="drop")
  continued.restore(queue.state())
  assert continued.stats()["expired"] == 1
  state = queue.state()
  assert (state["dropped"], state["retries"]) == (1, [])
  assert state["consumed"] == {"head": 7, "beyond": []}
  assert state["finished"] == {"head": 6, "beyond": []}


async def test_a_claim_is_durable_before_its_batch_is_handed_out(
  pool, monkeypatch
):
  queue = make_queue(pool)
  await admit(queue, 2)
  complete(queue, 1, 0)
  queue.take(2)
  assert pool.claims() == [records.Claim(1, trained=(0, 1))]


async def test_a_batch_with_a_lost_group_waits_for_its_new_attempt(
  pool, tmp_path
):
  queue = make_queue(pool)
  await admit(queue, 6)
  complete(queue, 0, 1, 2, 3, 4)
  for step in (1, 2):
    queue.take(2)
    queue.commit(step)
  pool.index.delete(records.GROUP, [2])  # as `verify --repair` does
  queue = make_queue(pool)
  assert indices(queue.take(2)) == [0, 1]
  with pytest.raises(errors.PoolError, match="no batch of 2"):
    queue.take(2, timeout=0)
  assert await admit(queue, 1) == [2]
  complete(queue, 2)
  assert indices(queue.take(2, timeout=10)) == [2, 3]


async def test_a_checkpoint_of_another_pool_is_refused(pool):
  queue = make_queue(pool)
  await admit(queue, 2)
  complete(queue, 0, 1)
  queue.take(2)
  queue.commit(1)
  state = queue.state() | {"trained_steps": 3}
  with pytest.raises(errors.PoolError, match=r"3 steps are trained.* step 1"):
    make_queue(pool).restore(state)


def drifting(pool):
  """A queue over 4 of 8 whose window follows the drift of 4 groups."""
  config = window_lib.WindowConfig(
    in_flight=8, window=1.0, max_lag=None, groups_per_step=4
  )
  drift = drift_lib.DriftConfig(recent=4, reference=16, adapt=True)
  return queue_lib.GroupQueue(pool, config, drift=drift)


async def test_the_window_follows_the_drift_and_is_found_again(pool):
  queue = drifting(pool)
  assert queue.stats()["window"] == 8
  await admit(queue, 8)
  for index in range(8):  # the later half is far longer
    queue.complete(
      sample_groups.make_group(index, episodes=1, turns=8 if index > 3 else 1)
    )
  queue.take(4, timeout=10)
  # The four short ones are trained, of eight that are half short: a distance
  # of 1/2, of which chance makes 0.87 * sqrt(1/4 + 1/8).
  assert queue.meter.by_feature["length"] == 0  # not to be told from chance
  queue.commit(1)
  await admit(queue, 4)
  for index in range(8, 12):
    queue.complete(sample_groups.make_group(index, episodes=1, turns=8))
  queue.restore(queue.state())
  wide = queue.stats()["window"]
  again = drifting(pool)
  again.restore(queue.state())
  assert again.meter.by_feature == queue.meter.by_feature
  assert again.meter.by_feature["length"] == pytest.approx(
    2 / 3 - drift_lib.noise(4, 12)
  )
  assert again.stats()["window"] == wide < 8


class Life:
  """A run that loses everything but its disk and its checkpoint, often."""

  def __init__(self, pool, rng, total):
    self.pool, self.rng = pool, rng
    self.config = {
      "in_flight": 6,
      "window": 4,
      "max_lag": 1,
      "over_lag": "drop",
      "total": total,
    }
    self.saved = None
    self.history = []  # the batches of the surviving history
    self.taken = {}  # batches by step, those of lost steps included
    self.deaths = self.expired = 0

  async def live(self):
    """One life; returns whether the run has ended."""
    queue = make_queue(self.pool, **self.config)
    if self.saved is not None:
      queue.restore(self.saved)
    running = []
    self.history = self.history[: queue.state()["trained_steps"]]
    while 2 * len(self.history) < self.config["total"]:
      while queue.stats()["admissible"]:
        running.append(await queue.admit())
      if running:
        self.complete(queue, running)
      try:
        batch = queue.take(2, timeout=0)
      except errors.PoolError:
        continue
      finally:
        self.expired = max(self.expired, queue.stats()["expired"])
      pairs = [(g.index, g.number) for g in batch]
      # A step that was lost takes the same batch again.
      assert pairs == self.taken.setdefault(len(self.history) + 1, pairs)
      if self.rng.random() < 0.2:
        self.deaths += 1
        return False
      self.history.append(pairs)
      queue.commit(len(self.history))
      if self.rng.random() < 0.3:
        self.saved = json.loads(json.dumps(queue.state()))
    return True

  def complete(self, queue, running):
    # Sometimes the oldest is left to be overtaken.
    place = 0 if len(running) == 1 or self.rng.random() < 0.5 else -1
    ticket = running.pop(place)
    group = sample_groups.make_group(ticket.index, episodes=1, turns=1)
    queue.complete(
      dataclasses.replace(group, number=ticket.number, attempt=ticket.attempt)
    )


@pytest.mark.parametrize("seed", range(4))
async def test_no_death_skips_or_repeats_a_task(pool, seed):
  life = Life(pool, random.Random(seed), total=100)
  while not await life.live():
    pass
  pairs = [pair for batch in life.history for pair in batch]
  items, tasks = zip(*pairs, strict=True)
  assert life.deaths > 1 and life.expired > 1
  assert len(set(items)) == len(items)
  assert sorted(tasks) == list(range(100))
