"""An evaluation counts what its episodes show."""

import asyncio

import pytest
import rollout_fakes as fakes

from forge_jax import errors, types
from forge_jax.rollout import episode as episode_lib
from forge_jax.rollout import evaluation


class Domain:
  """Task i of a split pays the i-th reward."""

  max_tokens = 16

  def __init__(self, name, rewards):
    self.name = name
    self._rewards = rewards

  def task(self, split, index):
    return types.Task(f"{self.name}/{split}/{index}", self.name, index, {})

  def environment(self, task):
    return fakes.FakeEnvironment(self._rewards[task.index])


async def evaluate(domains, count, gateway, **options):
  return await evaluation.evaluate(
    domains,
    "heldout",
    count,
    options.pop("agent", None) or fakes.Echo(),
    gateway,
    model_name="policy",
    **options,
  )


async def test_the_figures():
  gateway = fakes.FakeGateway()
  domains = [
    Domain("sums", [1.0, 0.3, ValueError("verifier"), 1.0]),
    Domain("code", [0.0, 1.0, 0.5, 0.3]),
  ]
  gateway.posted = (types.Reward("style", types.Component.PROCESS, -0.1),)
  result = await evaluate(domains, 4, gateway)
  assert result.n == 8 and result.failures == 1
  assert result.success_rate == pytest.approx(3 / 8)
  assert result.success_by_domain == {"sums": 0.5, "code": 0.25}
  assert result.mean_reward == pytest.approx(4.1 / 8 - 0.1)
  assert [e.task.id for e in result.episodes] == [
    f"{name}/heldout/{i}" for name in ("sums", "code") for i in range(4)
  ]
  assert result.seconds > 0 and not gateway.open


async def test_it_is_greedy_seeded_and_under_its_permits():
  sampling, seeds = [], []
  for seed in (0, 0, 1):
    gateway, agent = fakes.FakeGateway(), fakes.Echo()

    async def look(gateway=gateway):
      sampling.extend(s for _, s in gateway.open.values())

    agent.before = look
    domains = [Domain("sums", [1.0] * 20)]
    result = await evaluate(
      domains, 20, gateway, agent=agent, permits=3, seed=seed
    )
    seeds.append([e.seed for e in result.episodes])
    assert 1 < agent.most <= 3
  assert all(s == {"temperature": 0.0} for s in sampling) and sampling
  assert seeds[0] == seeds[1] and not set(seeds[0]) & set(seeds[2])


async def test_a_deadline_is_a_failure_and_not_an_end():
  async def hang():
    await asyncio.Event().wait()

  result = await evaluate(
    [Domain("sums", [1.0, 1.0])],
    2,
    fakes.FakeGateway(),
    agent=fakes.Echo(hang),
    deadline_seconds=0.02,
  )
  assert (result.success_rate, result.failures) == (0.0, 2)


async def test_a_lost_gateway_is_an_error(monkeypatch):
  monkeypatch.setattr(episode_lib, "_RETRY_DELAYS", ())
  gateway = fakes.FakeGateway()
  gateway.failures = 10**9
  with pytest.raises(errors.GatewayError, match="connection refused"):
    await evaluate([Domain("sums", [1.0])], 1, gateway)


async def test_an_empty_evaluation_is_refused():
  with pytest.raises(errors.ConfigError, match="0 tasks of 1 domains"):
    await evaluate([Domain("sums", [])], 0, fakes.FakeGateway())
