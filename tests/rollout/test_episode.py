"""Whatever happens in an episode is data on it, and its session is closed."""

import asyncio
import threading

import pytest
import rollout_fakes as fakes

from forge_jax import errors, types
from forge_jax.rollout import episode as episode_lib
from forge_jax.rollout import host

Status = types.EpisodeStatus


async def play(agent, *, gateway=None, rewards=(1.0,), deadline=30.0):
  gateway = gateway or fakes.FakeGateway()
  mixture = fakes.FakeMixture(rewards)
  runner = episode_lib.EpisodeRunner(
    agent,
    gateway,
    model_name="policy",
    permits=2,
    deadline_seconds=deadline,
    temperature=0.7,
  )
  attempt = episode_lib.Attempt("e0", mixture.task(0), 3, 11, 16)
  episode = await runner.run(attempt, mixture.environment)
  assert not gateway.open
  assert (episode.id, episode.member, episode.seed) == ("e0", 3, 11)
  return episode


async def test_a_completed_episode_holds_everything():
  gateway, agent = fakes.FakeGateway(), fakes.Echo()
  style = types.Reward("style", types.Component.PROCESS, 0.25, step=0)
  gateway.posted = (style,)
  episode = await play(agent, gateway=gateway)
  assert (episode.status, episode.error) == (Status.COMPLETED, None)
  assert [c.response_ids.tolist() for c in episode.completions] == [
    [11, 12, 13, 14]
  ]
  assert episode.perf == 1.0 and episode.rewards[1] == style
  assert episode.messages[-1] == {"role": "assistant", "content": "ok"}
  assert episode.seconds > 0
  (endpoint,) = agent.endpoints
  assert endpoint.model == "policy" and endpoint.max_tokens == 16
  assert endpoint.base_url == "http://gateway/v1"
  assert endpoint.api_key == f"key-{gateway.opened[0]}"


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
async def test_a_failing_agent_is_data(kind):
  async def fail():
    raise kind("no such tool")

  episode = await play(fakes.Echo(fail))
  assert episode.status == Status.FAILED
  assert episode.error == f"{kind.__name__}: no such tool"
  assert len(episode.completions) == 1  # what was captured is kept
  assert episode.perf == 0.0 and len(episode.rewards) == 1


async def test_a_deadline_ends_an_episode_and_keeps_what_it_has():
  async def hang():
    await asyncio.Event().wait()

  agent = fakes.Echo(hang)
  episode = await play(agent, deadline=0.02)
  assert episode.status == Status.TIMED_OUT
  assert "deadline of 0.02 seconds" in episode.error
  assert len(episode.completions) == 1 and len(episode.rewards) == 1
  assert agent.running == 0


async def test_an_agent_that_hides_its_timeout_has_timed_out():
  async def swallow():
    try:
      await asyncio.Event().wait()
    except asyncio.CancelledError:
      return

  episode = await play(fakes.Echo(swallow), deadline=0.3)
  assert episode.status == Status.TIMED_OUT
  assert episode.messages  # it came back, late


async def test_an_agents_own_timeout_is_a_failure():
  async def give_up():
    raise TimeoutError("tool took too long")

  episode = await play(fakes.Echo(give_up))
  assert episode.status == Status.FAILED
  assert episode.error == "TimeoutError: tool took too long"


async def test_an_agent_that_cancels_itself_is_data():
  async def cancel_itself():
    raise asyncio.CancelledError

  episode = await play(fakes.Echo(cancel_itself))
  assert episode.status == Status.FAILED
  assert "cancelled itself" in episode.error


async def test_an_environment_that_cannot_be_made_is_data():
  episode = await play(fakes.Echo(), rewards=(None,))
  assert episode.status == Status.FAILED
  assert episode.error == "OSError: no environment today"
  assert episode.rewards == ()


async def test_a_failing_verifier_is_data():
  episode = await play(fakes.Echo(), rewards=(KeyError("truth"),))
  assert episode.status == Status.FAILED
  assert episode.error == "rewards: KeyError: 'truth'"
  assert episode.messages and not episode.rewards


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_rewards_that_are_not_finite_are_dropped_and_noted(value):
  gateway = fakes.FakeGateway()
  gateway.posted = (
    types.Reward("posted", types.Component.PROCESS, -value),
    types.Reward("good", types.Component.PROCESS, 0.5),
  )
  episode = await play(fakes.Echo(), gateway=gateway, rewards=(value,))
  assert [r.name for r in episode.rewards] == ["good"]
  assert "'answer' is" in episode.error and "'posted' is" in episode.error
  assert episode.status == Status.FAILED


async def test_a_transcript_that_is_not_json_is_a_failure():
  class Odd(fakes.Echo):
    async def run(self, environment, endpoint):
      await super().run(environment, endpoint)
      return [{"role": "user", "content": object()}]

  episode = await play(Odd())
  assert episode.status == Status.FAILED
  assert "not JSON serializable" in episode.error
  assert episode.messages == ()


async def test_cancellation_closes_the_session_and_passes():
  started = asyncio.Event()

  async def hang():
    started.set()
    await asyncio.Event().wait()

  gateway, agent = fakes.FakeGateway(), fakes.Echo(hang)
  task = asyncio.create_task(play(agent, gateway=gateway))
  await started.wait()
  assert len(gateway.open) == 1
  task.cancel()
  with pytest.raises(asyncio.CancelledError):
    await task
  assert not gateway.open and agent.running == 0


async def test_cancellation_while_opening_leaves_no_session():
  class Slow(fakes.FakeGateway):
    async def open_session(self, id, *, seed, sampling):
      keys = await super().open_session(id, seed=seed, sampling=sampling)
      await asyncio.Event().wait()  # the reply never arrives
      return keys

  gateway = Slow()
  task = asyncio.create_task(play(fakes.Echo(), gateway=gateway))
  while not gateway.open:
    await asyncio.sleep(0)
  task.cancel()
  with pytest.raises(asyncio.CancelledError):
    await task
  assert not gateway.open


@pytest.fixture
def no_delays(monkeypatch):
  monkeypatch.setattr(episode_lib, "_RETRY_DELAYS", (0.0, 0.0, 0.0))


@pytest.mark.usefixtures("no_delays")
async def test_a_gateway_that_stumbles_is_asked_again():
  gateway = fakes.FakeGateway()
  gateway.failures = 3
  episode = await play(fakes.Echo(), gateway=gateway)
  assert episode.status == Status.COMPLETED


@pytest.mark.usefixtures("no_delays")
async def test_a_gateway_that_is_gone_is_no_data():
  gateway = fakes.FakeGateway()
  gateway.failures = 4
  with pytest.raises(errors.GatewayError, match="connection refused"):
    await play(fakes.Echo(), gateway=gateway)


def test_seeds_differ_repeat_and_fit():
  keys = [(s, i, m) for s in range(3) for i in range(30) for m in range(8)]
  seeds = [episode_lib.derive_seed(*key) for key in keys]
  assert len(set(seeds)) == len(seeds)
  assert all(0 <= seed < 2**31 for seed in seeds)
  assert seeds == [episode_lib.derive_seed(*key) for key in keys]


async def test_a_verifier_that_hangs_is_data_and_blocks_nobody():
  release = threading.Event()

  def hang():
    release.wait(60)
    return []

  hanging = [play_scored(hang, verifier_seconds=0.05) for _ in range(40)]
  try:
    *episodes, other = await asyncio.gather(*hanging, play(fakes.Echo()))
  finally:
    release.set()
  for episode in episodes:
    assert episode.status == Status.FAILED
    assert episode.error == "rewards: TimeoutError: none after 0.05 seconds"
    assert len(episode.completions) == 1 and episode.rewards == ()
  assert other.status == Status.COMPLETED


async def test_a_verifier_may_be_a_coroutine():
  async def slow():
    await asyncio.sleep(0.01)
    return [types.Reward("late", types.Component.PERF, 0.5)]

  async def hang():
    await asyncio.Event().wait()

  assert (await play_scored(slow)).perf == 0.5
  episode = await play_scored(hang, verifier_seconds=0.05)
  assert episode.error == "rewards: TimeoutError: none after 0.05 seconds"


@pytest.mark.parametrize("kind", [SystemExit, RecursionError, KeyError])
async def test_a_verifier_that_crashes_is_data(kind):
  def crash():
    raise kind("no verdict")

  episode = await play_scored(crash)
  assert episode.status == Status.FAILED
  assert episode.error.startswith(f"rewards: {kind.__name__}: ")


async def test_an_agent_that_never_asks_the_model_has_failed():
  class Silent(fakes.FakeGateway):
    async def close_session(self, id):
      await super().close_session(id)
      return (), ()

  episode = await play(fakes.Echo(), gateway=Silent())
  assert episode.status == Status.FAILED
  assert episode.error == "no completion: the agent never asked the model"
  assert episode.perf == 1.0


async def play_scored(rewards, **runner):
  """An episode whose environment's verifier is `rewards`."""

  class Environment(fakes.FakeEnvironment):
    pass

  Environment.rewards = staticmethod(rewards)
  gateway = fakes.FakeGateway()
  episodes = episode_lib.EpisodeRunner(
    fakes.Echo(),
    gateway,
    model_name="policy",
    permits=2,
    deadline_seconds=30.0,
    temperature=0.7,
    **runner,
  )
  task = fakes.FakeMixture().task(0)
  attempt = episode_lib.Attempt("e0", task, 3, 11, 16)
  episode = await episodes.run(attempt, lambda task: Environment())
  assert not gateway.open
  return episode


async def test_a_slow_domain_leaves_permits_for_others():
  running, most, ended = {"slow": 0, "fast": 0}, {"slow": 0, "fast": 0}, []

  class Agent:
    async def run(self, environment, endpoint):
      running[environment] += 1
      most[environment] = max(most[environment], running[environment])
      if environment == "slow":
        await release.wait()
      await asyncio.sleep(0)
      running[environment] -= 1
      ended.append(environment)
      return []

  class Environment(str):
    def rewards(self):
      return []

  release = asyncio.Event()
  runner = episode_lib.EpisodeRunner(
    Agent(),
    fakes.FakeGateway(),
    model_name="policy",
    permits=4,
    deadline_seconds=30.0,
    temperature=0.7,
    quotas={"slow": 0.5},
  )

  async def run(number, domain):
    task = types.Task(f"{domain}/{number}", domain, number, {})
    attempt = episode_lib.Attempt(task.id, task, 0, 1, 16)
    return await runner.run(attempt, lambda task: Environment(domain))

  async with asyncio.TaskGroup() as group:
    # The slow ones come first, and would take every permit.
    for number in range(6):
      group.create_task(run(number, "slow"))
    fast = [group.create_task(run(number, "fast")) for number in range(6)]
    await asyncio.wait(fast)
    assert ended == ["fast"] * 6 and most["slow"] == 2
    release.set()
  assert ended.count("slow") == 6 and most["slow"] == 2


def test_a_quota_is_a_share():
  with pytest.raises(errors.ConfigError, match=r"quota of 'slow' is 1\.5"):
    host.RolloutConfig(quotas={"slow": 1.5})
