"""Hosts of other processes between a trainer's queue and a real database."""

import asyncio
import contextlib

import pytest
import rollout_fakes as fakes

from forge_jax import errors
from forge_jax.pool import postgres
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import tickets as tickets_lib
from forge_jax.pool import window as window_lib
from forge_jax.rollout import host as host_lib
from forge_jax.rollout import leases, offers


class Trainer:
  """A queue over a shared pool, and what offers its tickets."""

  def __init__(self, server, schema, path):
    self.tickets = tickets_lib.Tickets(postgres.Postgres(server, schema))
    self.tickets.take_over()
    self.pool = postgres.open_pool(path, postgres.Postgres(server, schema))
    config = window_lib.WindowConfig(
      in_flight=6, window=3, max_lag=99, groups_per_step=2
    )
    self.queue = queue_lib.GroupQueue(self.pool, config)
    self.task = asyncio.create_task(
      offers.Offers(self.queue, self.tickets, poll_seconds=0.01).run()
    )

  async def take(self, count):
    return await asyncio.to_thread(self.queue.take, count, 30)

  async def stop(self):
    self.task.cancel()
    with contextlib.suppress(asyncio.CancelledError, errors.PoolError):
      await self.task
    self.pool.close()
    self.tickets.close()


class Host:
  """A rollout host with an agent and a gateway of no model."""

  def __init__(self, server, schema, path, name, agent=None, **config):
    self.pool = postgres.open_pool(
      path, postgres.Postgres(server, schema), leased=True
    )
    self.tickets = tickets_lib.Tickets(postgres.Postgres(server, schema))
    self.leases = leases.Leases(
      self.pool,
      self.tickets,
      leases.LeaseConfig(
        host=name, **{"most": 2, "seconds": 0.3, "poll_seconds": 0.01} | config
      ),
    )
    self.agent = agent or fakes.Echo()
    self.gateway = fakes.FakeGateway()
    self.host = host_lib.RolloutHost(
      host_lib.RolloutConfig(group_size=2, permits=4),
      fakes.FakeMixture(),
      self.agent,
      self.gateway,
      self.leases,
      "policy",
    )
    self.tasks = [
      asyncio.create_task(self.host.run()),
      asyncio.create_task(self.leases.renew()),
    ]

  async def stop(self):
    for task in self.tasks:
      task.cancel()
    await asyncio.gather(*self.tasks, return_exceptions=True)
    self.pool.close()
    self.tickets.close()


@pytest.fixture
async def shared(postgres_server, request, tmp_path):
  """Makes trainers and hosts of one pool; stops those that still run."""
  schema = f"test_{abs(hash(request.node.name))}"
  made = []

  def call(cls, *arguments, **config):
    made.append(cls(postgres_server, schema, tmp_path, *arguments, **config))
    return made[-1]

  yield call
  for one in reversed(made):
    await one.stop()


async def test_two_hosts_fill_one_queue(shared):
  trainer = shared(Trainer)
  hosts = [shared(Host, name) for name in ("a", "b")]
  seen = []
  for step in range(1, 7):
    batch = await trainer.take(2)
    seen += [(group.index, group.task.id) for group in batch]
    trainer.queue.commit(step)
  # In the order of the window, each once, and the very tasks that were asked.
  assert sorted(seen) == [
    (i, fakes.FakeMixture().task(i).id) for i in range(12)
  ]
  assert all(index <= place + 3 for place, (index, _) in enumerate(seen))
  assert all(host.host.stats()["groups"] for host in hosts)
  assert trainer.queue.io_tokens > 0


async def test_items_are_shared_and_those_of_a_host_that_ends_go_on(shared):
  trainer = shared(Trainer)
  slow = shared(Host, "a", agent=fakes.Echo(asyncio.Event().wait))
  while len(trainer.tickets.open_items()) < 6 or slow.agent.running < 4:
    await asyncio.sleep(0.01)
  fast = shared(Host, "b", most=9)
  # The first host has 0 and 1, and of the window of three one more is left.
  assert [group.index for group in await trainer.take(1)] == [2]
  trainer.queue.commit(1)
  await asyncio.sleep(0.5)  # longer than a lease: they are renewed
  assert trainer.queue.stats()["head"] == 0 and slow.agent.running == 4
  await slow.stop()
  assert [group.index for group in await trainer.take(4)] == [0, 1, 3, 4]
  assert fast.host.stats()["groups"] >= 3


async def test_of_two_hosts_with_one_item_the_first_stores_it(shared):
  trainer = shared(Trainer)
  awake = asyncio.Event()
  silent = shared(Host, "a", agent=fakes.Echo(awake.wait), most=1)
  while silent.agent.running < 2:
    await asyncio.sleep(0.01)
  silent.tasks[1].cancel()  # its lease ends
  shared(Host, "b", most=9)
  batch = await trainer.take(4)
  assert [group.index for group in batch] == [0, 1, 2, 3]
  trainer.queue.commit(1)
  awake.set()
  while not silent.host.stats().get("groups"):
    await asyncio.sleep(0.01)
  again = await trainer.take(2)
  assert [group.index for group in again] == [4, 5]


async def test_a_host_goes_on_with_its_item_when_the_trainer_comes_again(
  shared,
):
  first = shared(Trainer)
  awake = asyncio.Event()
  host = shared(Host, "a", agent=fakes.Echo(awake.wait), most=1)
  while host.agent.running < 2:
    await asyncio.sleep(0.01)
  await first.stop()
  second = shared(Trainer)
  awake.set()
  assert [group.index for group in await second.take(2)] == [0, 1]
  started = [name.split("-")[0] for name in host.gateway.opened]
  assert started.count("group0") == 2  # its two members, once


async def test_what_fails_reaches_both_ends(shared):
  trainer = shared(Trainer)
  host = shared(Host, "a", agent=fakes.Echo(asyncio.Event().wait))
  while host.agent.running < 4:
    await asyncio.sleep(0.01)
  database = trainer.tickets._database
  database.execute("DROP TABLE tickets CASCADE")
  for task in (trainer.task, host.tasks[1]):
    with pytest.raises(errors.PoolError, match="tickets"):
      await asyncio.wait_for(asyncio.shield(task), 30)
  with pytest.raises(errors.PoolError, match="tickets"):
    await trainer.take(1)


@pytest.mark.parametrize("field", ["most", "seconds", "poll_seconds"])
def test_leases_that_cannot_be_are_refused(field):
  with pytest.raises(errors.ConfigError, match=f"{field}"):
    leases.LeaseConfig(**{"most": 1} | {field: 0})
