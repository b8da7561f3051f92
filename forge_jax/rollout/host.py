"""The rollout host: it turns tasks into completed groups, for ever.

Invariants:
  1. Every index that was admitted ends as one completed group, is given back
     (cancellation), or the host has failed.
  2. A group is completed when all its G episodes have ended; each has ended
     by its deadline, so that a hung agent holds the window for a bounded time.
  3. When `run` returns, by whatever way, no episode is running and every
     session is closed.

The host keeps no state that a restart needs: an episode's seed derives from
the run's seed, the task's number, the member and the attempt.
"""

import asyncio
import collections
from collections.abc import Mapping
import dataclasses
import logging
from typing import Protocol

from forge_jax import errors, types
from forge_jax.agents import base as agents_base
from forge_jax.gateway import client
from forge_jax.pool import progress
from forge_jax.rollout import episode as episode_lib
from forge_jax.rollout import process as process_lib
from forge_jax.tasks import base as tasks_base

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class RolloutConfig:
  """How groups are rolled out."""

  group_size: int = 8  # G: episodes of one task
  permits: int = 64  # most episodes that run at once
  deadline_seconds: float = 600.0  # wall-clock, of one episode
  verifier_seconds: float = 120.0  # wall-clock, to score one episode
  temperature: float = 1.0  # of sampling, where the agent sets none
  # Largest share of the permits by domain: a slow one must not hold them all.
  quotas: Mapping[str, float] = dataclasses.field(default_factory=dict)
  seed: int = 0  # all episodes' seeds derive from it

  def __post_init__(self):
    for name in ("group_size", "permits"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"rollout {name} is {getattr(self, name)}; expected at least 1"
        )
    for name in ("deadline_seconds", "verifier_seconds"):
      if not getattr(self, name) > 0:
        raise errors.ConfigError(
          f"rollout {name} is {getattr(self, name)}; expected more than 0"
        )
    for domain, share in self.quotas.items():
      if not 0 < share <= 1:
        raise errors.ConfigError(
          f"rollout quota of {domain!r} is {share}; expected a share above 0"
        )
    if self.temperature < 0 or self.seed < 0:
      raise errors.ConfigError(
        f"rollout temperature is {self.temperature} and seed {self.seed}; "
        "expected at least 0"
      )


class Mixture(Protocol):
  """Where the host's tasks come from: an endless, seeded sequence."""

  def task(self, index: int) -> types.Task:
    """The task of the group with this index."""

  def environment(self, task: types.Task) -> tasks_base.Environment:
    """A fresh environment for one episode of the task."""

  def max_tokens(self, task: types.Task) -> int:
    """Most new tokens of one completion."""


class Work(Protocol):
  """Where a host gets tickets and leaves groups.

  The trainer's queue (`pool.queue.GroupQueue`), or what a host of another
  process leases (`leases.Leases`).
  """

  async def admit(self) -> progress.Ticket:
    """Waits until a group may be started; says which."""

  def release(self, index: int) -> None:
    """Gives back an admitted group that will not be completed here."""

  def complete(self, group: types.Group) -> None:
    """Makes a group durable; blocks, and is called on other threads."""

  def fail(self, error: BaseException) -> None:
    """Makes every waiting and later call raise `error`."""


class RolloutHost:
  """Turns tickets into groups; used from one asyncio loop."""

  def __init__(
    self,
    config: RolloutConfig,
    mixture: Mixture,
    agent: agents_base.Agent,
    gateway: client.GatewayClient,
    work: Work,
    model_name: str,
    process: process_lib.ProcessRewards | None = None,
  ):
    self._config = config
    self._mixture = mixture
    self._work = work
    self._runner = episode_lib.EpisodeRunner(
      agent,
      gateway,
      model_name=model_name,
      permits=config.permits,
      deadline_seconds=config.deadline_seconds,
      verifier_seconds=config.verifier_seconds,
      temperature=config.temperature,
      process=process,
      quotas=config.quotas,
    )
    self._counts: collections.Counter[str] = collections.Counter()

  async def run(self) -> None:
    """Rolls out groups until it is cancelled.

    Raises:
      GatewayError: the gateway could not be used, after several attempts.
      PoolError: a group could not be stored, or there is no work any more.
      Exception: what else made the host fail. The work has failed with it.
    """
    try:
      async with asyncio.TaskGroup() as groups:
        while True:
          ticket = await self._work.admit()
          groups.create_task(self._serve(ticket), name=f"group {ticket.index}")
    except ExceptionGroup as failures:
      failure = episode_lib.first_failure(failures)
      self._work.fail(failure)
      raise failure from failures

  def stats(self) -> Mapping[str, float]:
    """Counts since the start of what has ended.

    groups, episodes, failures, timeouts, response_tokens, and seconds (the
    sum of the episodes' wall-clock times).
    """
    names = (
      "groups",
      "episodes",
      "failures",
      "timeouts",
      "response_tokens",
      "seconds",
    )
    return {name: self._counts[name] for name in names}

  async def _serve(self, ticket: progress.Ticket) -> None:
    try:
      group = await self._roll_out(ticket)
    except asyncio.CancelledError:
      self._work.release(ticket.index)
      raise
    # On a thread, because it waits for the disk. Once begun it ends, even if
    # this task is cancelled.
    await asyncio.to_thread(self._work.complete, group)
    self._counts["groups"] += 1

  async def _roll_out(self, ticket: progress.Ticket) -> types.Group:
    task = self._mixture.task(ticket.number)
    async with asyncio.TaskGroup() as members:
      episodes = [
        members.create_task(self._episode(ticket, task, member))
        for member in range(self._config.group_size)
      ]
    return types.Group(
      index=ticket.index,
      task=task,
      episodes=tuple(e.result() for e in episodes),
      number=ticket.number,
      attempt=ticket.attempt,
    )

  async def _episode(
    self, ticket: progress.Ticket, task: types.Task, member: int
  ) -> types.Episode:
    again = (ticket.attempt,) if ticket.attempt else ()
    attempt = episode_lib.Attempt(
      id=f"group{ticket.index}-{member}",
      task=task,
      member=member,
      seed=episode_lib.derive_seed(
        self._config.seed, ticket.number, member, *again
      ),
      max_tokens=self._mixture.max_tokens(task),
    )
    episode = await self._runner.run(attempt, self._mixture.environment)
    self._count(episode)
    return episode

  def _count(self, episode: types.Episode) -> None:
    self._counts["episodes"] += 1
    if episode.status == types.EpisodeStatus.FAILED:
      self._counts["failures"] += 1
      count = int(self._counts["failures"])
      if not count & (count - 1):  # the first, second, fourth, ...
        _log.warning(
          "episode %s failed (%d so far): %s",
          episode.id,
          count,
          episode.error,
        )
    self._counts["timeouts"] += episode.status == types.EpisodeStatus.TIMED_OUT
    self._counts["response_tokens"] += sum(
      len(c.response_ids) for c in episode.completions
    )
    self._counts["seconds"] += episode.seconds
