"""Batches ahead of the trainer: in order, in the background, restartable."""

import asyncio
import json
import threading

import grain
import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import dataset, store, window
from forge_jax.pool import queue as queue_lib


@pytest.fixture
def pool(tmp_path):
  with store.DataPool.open(tmp_path / "pool") as opened:
    yield opened


class Rig:
  """A queue with batches of two, an iterator, and what it prepared."""

  def __init__(self, pool, ahead=1, prepare=None):
    self.prepared = []
    self.threads = set()
    self.queue = queue_lib.GroupQueue(
      pool,
      window.WindowConfig(
        in_flight=16, window=4, max_lag=None, groups_per_step=2
      ),
    )
    self.batches = dataset.iterate(
      self.queue, 2, prepare or self.prepare, ahead
    )

  def prepare(self, groups):
    self.threads.add(threading.current_thread())
    self.prepared.append([group.index for group in groups])
    return tuple(self.prepared[-1])

  def fill(self, count):
    async def admit():
      return [(await self.queue.admit()).index for _ in range(count)]

    for index in asyncio.run(admit()):
      self.queue.complete(sample_groups.make_group(index, episodes=1, turns=1))

  def close(self):
    self.queue.close()
    self.batches.close()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_come_in_order_and_are_prepared_ahead(pool, ahead):
  rig = Rig(pool, ahead)
  rig.fill(12)
  assert isinstance(rig.batches, grain.DatasetIterator)
  assert next(rig.batches) == (0, 1)
  # Those kept ready and the one in the making; without, none.
  most = 1 + ahead + (ahead > 0)
  deadline = threading.Event()
  for _ in range(200):
    if len(rig.prepared) == most:
      break
    deadline.wait(0.05)
  assert len(rig.prepared) == most
  assert [next(rig.batches) for _ in range(2)] == [(2, 3), (4, 5)]
  assert (threading.main_thread() in rig.threads) == (ahead == 0)
  rig.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_state_is_that_of_the_batches_handed_out(pool, ahead):
  rig = Rig(pool, ahead)
  start = rig.batches.get_state()
  rig.fill(12)
  states = [start]
  for step in range(1, 4):
    next(rig.batches)
    states.append(json.loads(json.dumps(rig.batches.get_state())))
    rig.queue.commit(step)
  assert [state["trained_steps"] for state in states] == [0, 1, 2, 3]
  assert [s["consumed"]["head"] for s in states] == [0, 2, 4, 6]
  rig.close()
  # From any of them the very same batches follow.
  for trained, state in enumerate(states):
    again = Rig(pool, ahead)
    again.batches.set_state(state)
    rest = [next(again.batches) for _ in range(6 - trained)]
    assert rest == [(2 * k, 2 * k + 1) for k in range(trained, 6)]
    again.close()


def test_a_batch_that_was_claimed_ahead_is_not_in_the_committed_state(pool):
  rig = Rig(pool, ahead=0)
  rig.fill(6)
  next(rig.batches)
  next(rig.batches)
  rig.queue.commit(1)
  assert rig.queue.state()["trained_steps"] == 1
  assert rig.queue.position() == rig.batches.get_state()
  assert rig.queue.position()["trained_steps"] == 2
  rig.queue.commit(2)
  assert rig.queue.state() == rig.queue.position()
  rig.close()


def test_what_goes_wrong_ahead_reaches_who_asks(pool):
  def prepare(groups):
    if groups[0].index == 2:
      raise errors.SampleError("group 2 is malformed")
    return groups

  rig = Rig(pool, prepare=prepare)
  rig.fill(6)
  next(rig.batches)
  with pytest.raises(errors.SampleError, match="group 2"):
    next(rig.batches)
  rig.close()


def test_closing_ends_a_wait_for_groups(pool):
  rig = Rig(pool)
  threading.Timer(0.1, rig.queue.close).start()
  with pytest.raises(errors.PoolError, match="closed"):
    next(rig.batches)
  rig.batches.close()
  assert not [
    t for t in threading.enumerate() if "prefetch" in t.name and t.is_alive()
  ]
