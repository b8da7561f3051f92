"""What policies without a model reach in a domain: the scale of its success.

A success that chance reaches too proves nothing, and one that not even the
domain's own solutions reach is the verifier's fault.
"""

import asyncio
from collections.abc import Sequence
import dataclasses
import inspect
import statistics
import time

from forge_jax import errors, types
from forge_jax.agents import scripted, workspace
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.rollout import episode
from forge_jax.tasks import base as tasks_base

_AT_ONCE = 8  # episodes


@dataclasses.dataclass(frozen=True, slots=True)
class Baseline:
  """What a policy reached."""

  success_rate: float  # share of episodes with perf >= 1, 0..1
  mean_reward: float  # mean over the episodes of the sum of all rewards
  seconds: float  # median wall-clock of an episode, scoring left out


async def play(
  domain: tasks_base.Domain,
  split: str,
  count: int,
  policy: str,
  backend: sandbox_base.Backend,
) -> Baseline:
  """Plays the first tasks of a split after the domain's own script.

  Args:
    domain: what is played; knows scripts.
    split: of its tasks.
    count: tasks, at least 1.
    policy: "random", "optimal" or another that the domain knows.
    backend: opens the sandboxes that work on files is done in.

  Raises:
    ConfigError: the domain knows no scripts, or there is nothing to play.
  """
  if not isinstance(domain, tasks_base.Scripted) or count < 1:
    raise errors.ConfigError(
      f"baseline of {count} tasks of {domain.name}: expected at least 1, and a "
      "domain with a method `script`"
    )
  permits = asyncio.Semaphore(_AT_ONCE)

  async def one(index: int) -> tuple[Sequence[types.Reward], float]:
    task = domain.task(split, index)
    environment = domain.environment(task)
    agent = workspace.WorkspaceAgent(
      scripted.ScriptedAgent(domain.script(task, policy)), backend
    )
    async with permits:
      started = time.monotonic()
      await agent.run(environment, None)
      seconds = time.monotonic() - started
      rewards = environment.rewards()
      if inspect.isawaitable(rewards):
        rewards = await rewards
    return rewards, seconds

  try:
    async with asyncio.TaskGroup() as group:
      runs = [group.create_task(one(index)) for index in range(count)]
  except ExceptionGroup as failures:
    raise episode.first_failure(failures) from failures
  played = [run.result() for run in runs]
  perf = types.Component.PERF
  return Baseline(
    success_rate=statistics.fmean(
      sum(r.value for r in rewards if r.component == perf) >= 1
      for rewards, _ in played
    ),
    mean_reward=statistics.fmean(
      sum(r.value for r in rewards) for rewards, _ in played
    ),
    seconds=statistics.median(seconds for _, seconds in played),
  )
