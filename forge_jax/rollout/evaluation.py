"""Evaluation: a fixed set of tasks, one episode each, greedy by default.

An episode succeeds when its perf rewards reach 1, the full score of every
verifier. Failed and timed-out episodes count like any other.
"""

import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import statistics
import time

from forge_jax import errors, types
from forge_jax.agents import base as agents_base
from forge_jax.gateway import client
from forge_jax.rollout import episode as episode_lib
from forge_jax.tasks import base as tasks_base

_FULL_SCORE = 1.0 - 1e-6  # perf may be a sum of floats


@dataclasses.dataclass(frozen=True, slots=True)
class EvalConfig:
  """What is evaluated and when; counts are tasks of each domain, 0: none."""

  heldout: int = 200  # of the held-out split, before and after the run
  phrasings: int = 200  # of the unseen phrasings, before and after the run
  every: int = 0  # trainer steps between evaluations during the run; 0: none
  during: int = 64  # held-out tasks of an evaluation during the run
  context: str = ""  # strategy of a white-box agent's context; "": the run's


@dataclasses.dataclass(frozen=True, slots=True)
class EvalResult:
  """What an evaluation found."""

  success_rate: float  # share of episodes with full perf, 0..1
  mean_reward: float  # mean over the episodes of the sum of all rewards
  n: int  # number of episodes
  failures: int  # of these, how many failed or timed out
  seconds: float  # wall-clock of the evaluation
  success_by_domain: Mapping[str, float]  # success rate, 0..1
  episodes: tuple[types.Episode, ...]  # by domain, then by task


async def evaluate(
  domains: Sequence[tasks_base.Domain],
  split: str,
  count: int,
  agent: agents_base.Agent,
  gateway: client.GatewayClient,
  *,
  model_name: str,
  permits: int = 64,
  seed: int = 0,
  temperature: float = 0.0,
  deadline_seconds: float = 600.0,
) -> EvalResult:
  """Plays the first `count` tasks of a split of every domain once.

  Args:
    domains: what to evaluate on; a sample of each weighs the same.
    split: a split that every domain has.
    count: tasks of each domain, at least 1.
    agent: who plays.
    gateway: in front of the engine whose weights are evaluated.
    model_name: what the agent calls the model.
    permits: most episodes that run at once.
    seed: of the sampling; without effect at temperature 0.
    temperature: of the sampling, where the agent sets none.
    deadline_seconds: wall-clock of one episode.

  Raises:
    ConfigError: there is nothing to evaluate.
    GatewayError: the gateway could not be used, after several attempts.
  """
  if not domains or count < 1:
    raise errors.ConfigError(
      f"an evaluation of {count} tasks of {len(domains)} domains is empty"
    )
  runner = episode_lib.EpisodeRunner(
    agent,
    gateway,
    model_name=model_name,
    permits=permits,
    deadline_seconds=deadline_seconds,
    temperature=temperature,
  )
  started = time.monotonic()
  attempts = [
    (domain, _attempt(domain, split, index, (seed, number, index)))
    for number, domain in enumerate(domains)
    for index in range(count)
  ]
  try:
    async with asyncio.TaskGroup() as group:
      runs = [
        group.create_task(runner.run(attempt, domain.environment))
        for domain, attempt in attempts
      ]
  except ExceptionGroup as failures:
    raise episode_lib.first_failure(failures) from failures
  episodes = tuple(run.result() for run in runs)
  return _result(episodes, time.monotonic() - started)


def _attempt(
  domain: tasks_base.Domain, split: str, index: int, entropy: tuple[int, ...]
) -> episode_lib.Attempt:
  task = domain.task(split, index)
  return episode_lib.Attempt(
    id=f"eval-{task.id}",
    task=task,
    member=0,
    seed=episode_lib.derive_seed(*entropy),
    max_tokens=domain.max_tokens,
  )


def _result(episodes: tuple[types.Episode, ...], seconds: float) -> EvalResult:
  by_domain: dict[str, list[bool]] = {}
  for episode in episodes:
    success = episode.perf >= _FULL_SCORE
    by_domain.setdefault(episode.task.domain, []).append(success)
  totals = [sum(r.value for r in e.rewards) for e in episodes]
  ended = types.EpisodeStatus.COMPLETED
  return EvalResult(
    success_rate=statistics.fmean(itertools.chain(*by_domain.values())),
    mean_reward=statistics.fmean(totals),
    n=len(episodes),
    failures=sum(e.status != ended for e in episodes),
    seconds=seconds,
    success_by_domain={
      name: statistics.fmean(s) for name, s in by_domain.items()
    },
    episodes=episodes,
  )
