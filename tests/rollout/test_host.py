"""The host fills the queue, leaks nothing, and fails only for a reason."""

import asyncio
import contextlib
import re

import pytest
import rollout_fakes as fakes

from forge_jax import errors, types
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import store
from forge_jax.pool import window as window_lib
from forge_jax.rollout import episode as episode_lib
from forge_jax.rollout import host as host_lib


@pytest.fixture
def pool(tmp_path):
  with store.DataPool.open(tmp_path / "pool") as opened:
    yield opened


class Rig:
  """A host with everything around it."""

  def __init__(self, pool, agent=None, mixture=None, window=None, **config):
    defaults = {"in_flight": 4, "window": 4, "max_lag": 99}
    self.queue = queue_lib.GroupQueue(
      pool,
      window_lib.WindowConfig(
        **defaults | {"groups_per_step": 2} | (window or {})
      ),
    )
    self.gateway = fakes.FakeGateway()
    self.agent = agent or fakes.Echo()
    self.host = host_lib.RolloutHost(
      host_lib.RolloutConfig(**{"group_size": 3, "permits": 5} | config),
      mixture or fakes.FakeMixture(),
      self.agent,
      self.gateway,
      self.queue,
      "policy",
    )

  async def take(self, count):
    return await asyncio.to_thread(self.queue.take, count, 30)

  @contextlib.asynccontextmanager
  async def running(self):
    """Runs the host; afterwards nothing of it may be left."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(self.host.run())
    try:
      yield task
    finally:
      task.cancel()
      with contextlib.suppress(asyncio.CancelledError, errors.ForgeError):
        await task
    assert asyncio.all_tasks() <= before
    assert self.agent.running == 0


async def test_groups_arrive_whole_in_order_and_under_the_permits(pool):
  rig = Rig(pool)
  async with rig.running():
    batches = [await rig.take(2) for _ in range(3)]
  assert all(one.index < other.index for one, other in batches)
  groups = [group for batch in batches for group in batch]
  assert len({group.index for group in groups}) == 6
  for group in groups:
    assert group.task.id == f"fake/train/{group.index}"
    assert [e.member for e in group.episodes] == [0, 1, 2]
    for episode in group.episodes:
      expected = episode_lib.derive_seed(0, group.index, episode.member)
      assert episode.seed == expected
      assert episode.id == f"group{group.index}-{episode.member}"
      assert episode.status == types.EpisodeStatus.COMPLETED
  assert 1 < rig.agent.most <= 5
  assert len(set(rig.gateway.opened)) == len(rig.gateway.opened)
  assert not rig.gateway.open


async def test_sampling_and_seed_reach_the_gateway(pool):
  rig = Rig(pool, temperature=0.5, seed=7)
  seen = []

  async def look():
    seen.extend(rig.gateway.open.values())

  rig.agent.before = look
  async with rig.running():
    await rig.take(1)
  seeds = {episode_lib.derive_seed(7, 0, member) for member in range(3)}
  assert seeds <= {seed for seed, _ in seen}
  assert all(sampling == {"temperature": 0.5} for _, sampling in seen)


async def test_bad_episodes_are_data_in_their_group(pool, caplog):
  rig = Rig(
    pool,
    mixture=fakes.FakeMixture((1.0, float("nan"), None)),
    window={"in_flight": 3, "window": 3},
  )
  async with rig.running():
    groups = await rig.take(3)
    stats = rig.host.stats()
  for group in groups:  # in the order in which they were completed
    error = (None, "dropped", "OSError")[group.index]
    for episode in group.episodes:
      assert (
        (episode.error is None) if error is None else error in (episode.error)
      )
      assert len(episode.completions) == 1
  said = re.findall(r"failed \((\d+) so far\): ", caplog.text)
  assert len(said) >= 3  # the host may have gone on since the figures
  assert said == [str(2**n) for n in range(len(said))]
  assert stats["failures"] >= 6 and stats["groups"] >= 3
  assert stats["response_tokens"] == 4 * stats["episodes"] >= 36


async def test_a_straggler_is_timed_out_and_its_group_completes(pool):
  async def hang_once():
    agent.before = None
    await asyncio.Event().wait()

  agent = fakes.Echo(hang_once)
  rig = Rig(pool, agent, deadline_seconds=1.0)
  async with rig.running():
    groups = await rig.take(4)
    assert rig.host.stats()["timeouts"] == 1
  assert [g.index for g in groups] == [0, 1, 2, 3]
  statuses = [e.status for g in groups for e in g.episodes]
  assert statuses.count("timed_out") == 1 and statuses.count("completed") == 11


async def test_max_lag_0_runs_one_step_at_a_time(pool):
  rig = Rig(pool, window={"max_lag": 0})
  async with rig.running():
    for step in range(1, 4):
      groups = await rig.take(2)
      assert [g.index for g in groups] == [2 * step - 2, 2 * step - 1]
      await asyncio.sleep(0.02)
      # Nothing of the next step has begun before this one is trained.
      assert len(rig.gateway.opened) == 2 * 3 * step
      rig.queue.commit(step)


async def test_cancellation_closes_sessions_and_gives_back_groups(pool):
  async def hang():
    await asyncio.Event().wait()

  rig = Rig(pool, fakes.Echo(hang), window={"in_flight": 4, "window": 1})
  async with rig.running() as task:
    while rig.agent.running < 5:
      await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
  assert len(rig.gateway.opened) == 5 and not rig.gateway.open
  assert rig.queue.stats()["in_progress"] == 0
  rig.agent.before = None
  async with rig.running():  # another run of it goes on where it stopped
    assert [g.index for g in await rig.take(4)] == [0, 1, 2, 3]


async def test_a_lost_gateway_fails_host_and_trainer(pool, monkeypatch):
  monkeypatch.setattr(episode_lib, "_RETRY_DELAYS", (0.0,))
  rig = Rig(pool)
  rig.gateway.failures = 10**9
  async with rig.running() as task:
    with pytest.raises(errors.GatewayError, match="connection refused"):
      await rig.take(1)
    with pytest.raises(errors.GatewayError, match="connection refused"):
      await task


async def test_a_full_disk_fails_host_and_trainer(pool, monkeypatch):
  def refuse(group):
    raise errors.PoolError("disk full")

  monkeypatch.setattr(pool, "append", refuse)
  rig = Rig(pool)
  async with rig.running() as task:
    with pytest.raises(errors.PoolError, match="disk full"):
      await rig.take(1)
    with pytest.raises(errors.PoolError, match="disk full"):
      await task
  assert not rig.gateway.open


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"group_size": 0}, "group_size is 0"),
    ({"permits": 0}, "permits is 0"),
    ({"deadline_seconds": 0.0}, "deadline_seconds is 0.0"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"seed": -1}, "seed -1"),
  ],
)
def test_bad_configs_are_refused(fields, message):
  with pytest.raises(errors.ConfigError, match=message):
    host_lib.RolloutConfig(**fields)
