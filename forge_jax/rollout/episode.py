"""One episode: a session is opened, an agent plays, the session is closed.

This is the boundary at which a failure becomes data. Whatever an agent, its
environment or its verifier raises ends up on the episode, with everything
that the gateway captured until then. So does a verifier that does not end, and
an agent that never asked the model. Two things pass through: a cancellation
from outside, and a gateway that cannot be used after several attempts.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import inspect
import json
import math
import secrets
import threading
import time

import numpy as np

from forge_jax import errors, types
from forge_jax.agents import base as agents_base
from forge_jax.gateway import client
from forge_jax.rollout import process as process_lib
from forge_jax.tasks import base as tasks_base

# Seconds to wait before each further attempt to reach the gateway.
_RETRY_DELAYS = (0.1, 0.3, 1.0)
# Seconds that a verifier may hold the loop up.
_AT_ONCE = 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
  """What distinguishes one episode from another."""

  id: str  # of the episode, unique within a run
  task: types.Task
  member: int  # 0..G-1 within its group
  seed: int  # of everything sampled in the episode, below 2**31
  max_tokens: int  # most new tokens of one completion


def derive_seed(*entropy: int) -> int:
  """Returns an episode's seed, 0 <= seed < 2**31, from non-negative ints."""
  (word,) = np.random.SeedSequence(entropy).generate_state(1)
  return int(word >> 1)


def first_failure(failures: ExceptionGroup) -> Exception:
  """Returns the first failure that is not itself a group."""
  failure = failures.exceptions[0]
  if isinstance(failure, ExceptionGroup):
    return first_failure(failure)
  return failure


class EpisodeRunner:
  """Runs episodes of one agent against one gateway; at most `permits` at once.

  Of these a domain with a quota holds its share at most, so that one whose
  episodes are slow leaves room for others. Used from one asyncio loop.
  """

  def __init__(
    self,
    agent: agents_base.Agent,
    gateway: client.GatewayClient,
    *,
    model_name: str,
    permits: int,
    deadline_seconds: float,
    temperature: float,
    verifier_seconds: float = 120.0,
    process: process_lib.ProcessRewards | None = None,
    quotas: Mapping[str, float] | None = None,
  ):
    self._quotas = {
      domain: asyncio.Semaphore(max(int(share * permits), 1))
      for domain, share in (quotas or {}).items()
    }
    self._process = process
    self._agent = agent
    self._gateway = gateway
    self._model_name = model_name
    self._permits = asyncio.Semaphore(permits)
    self._deadline = deadline_seconds
    self._verifier_seconds = verifier_seconds
    self._sampling = {"temperature": temperature}

  async def run(
    self,
    attempt: Attempt,
    make_environment: Callable[[types.Task], tasks_base.Environment],
  ) -> types.Episode:
    """Waits for a permit, plays an episode, and returns it however it ended.

    Raises:
      GatewayError: the gateway could not be used, after several attempts.
    """
    quota = self._quotas.get(attempt.task.domain, contextlib.nullcontext())
    async with quota, self._permits:
      session, keys = await self._open(attempt)
      try:
        endpoint = self._endpoint(attempt, session, keys)
        outcome = await self._play(attempt, make_environment, endpoint)
        completions, posted = await _persist(
          lambda: self._gateway.close_session(session)
        )
      except asyncio.CancelledError:
        with contextlib.suppress(errors.GatewayError):
          await self._gateway.close_session(session)
        raise
    outcome.add_rewards(posted)
    if self._process is not None:
      outcome.add_rewards(self._process(completions, outcome.messages))
    if not completions and outcome.status == types.EpisodeStatus.COMPLETED:
      outcome.fail("no completion: the agent never asked the model")
    return types.Episode(
      id=attempt.id,
      task=attempt.task,
      member=attempt.member,
      seed=attempt.seed,
      status=outcome.status,
      completions=completions,
      rewards=tuple(outcome.rewards),
      messages=outcome.messages,
      seconds=outcome.seconds,
      error=outcome.error,
    )

  async def _open(self, attempt: Attempt) -> tuple[str, client.SessionKeys]:
    async def once() -> tuple[str, client.SessionKeys]:
      # A gateway may outlive this process, or keep a session whose reply was
      # lost, so that an episode's id alone could be taken.
      session = f"{attempt.id}-{secrets.token_hex(4)}"
      try:
        keys = await self._gateway.open_session(
          session, seed=attempt.seed, sampling=self._sampling
        )
      except asyncio.CancelledError:
        with contextlib.suppress(errors.GatewayError):
          await self._gateway.close_session(session)
        raise
      return session, keys

    return await _persist(once)

  def _endpoint(
    self, attempt: Attempt, session: str, keys: client.SessionKeys
  ) -> agents_base.Endpoint:
    return agents_base.Endpoint(
      base_url=keys.base_url,
      api_key=keys.api_key,
      model=self._model_name,
      max_tokens=attempt.max_tokens,
      reward_url=self._gateway.reward_url(session),
      control_key=keys.control_key,
    )

  async def _play(
    self,
    attempt: Attempt,
    make_environment: Callable[[types.Task], tasks_base.Environment],
    endpoint: agents_base.Endpoint,
  ) -> "_Outcome":
    outcome = _Outcome()
    clock = asyncio.timeout(self._deadline)
    environment = None
    started = time.monotonic()
    try:
      environment = make_environment(attempt.task)
      async with clock:
        messages = await self._agent.run(environment, endpoint)
        outcome.messages = _as_json(messages)
    except asyncio.CancelledError:
      if asyncio.current_task().cancelling():
        raise
      outcome.fail("CancelledError: the agent cancelled itself")
    except (Exception, SystemExit) as failure:
      # The boundary: an agent's failure is data, even one that calls exit().
      outcome.fail(_describe(failure))
    outcome.seconds = time.monotonic() - started
    if clock.expired():
      outcome.time_out(self._deadline)
    if environment is not None:
      await outcome.score(environment, self._verifier_seconds)
    return outcome


class _Outcome:
  """What is known of an episode but for what the gateway captured."""

  def __init__(self):
    self.status = types.EpisodeStatus.COMPLETED
    self.error: str | None = None
    self.messages: tuple[types.Message, ...] = ()
    self.rewards: list[types.Reward] = []
    self.seconds = 0.0

  def fail(self, error: str) -> None:
    """Notes a failure; a deadline that has passed remains the status."""
    if self.status == types.EpisodeStatus.COMPLETED:
      self.status = types.EpisodeStatus.FAILED
    self.error = error if self.error is None else f"{self.error}; {error}"

  def time_out(self, deadline: float) -> None:
    """Notes that the deadline passed, whatever the agent made of it."""
    self.status = types.EpisodeStatus.TIMED_OUT
    self.error = f"TimeoutError: the deadline of {deadline:g} seconds passed"

  async def score(
    self, environment: tasks_base.Environment, seconds: float
  ) -> None:
    """Adds the environment's rewards, if they come in time."""
    clock = asyncio.timeout(seconds)
    try:
      async with clock:
        self.add_rewards(await _verdict(environment.rewards))
    except (Exception, SystemExit) as error:
      # The boundary: a verifier's failure is data.
      late = TimeoutError(f"none after {seconds:g} seconds")
      self.fail(f"rewards: {_describe(late if clock.expired() else error)}")

  def add_rewards(self, rewards: Sequence[types.Reward]) -> None:
    """Adds the finite rewards and notes the others."""
    for reward in rewards:
      value = float(reward.value)
      if math.isfinite(value):
        self.rewards.append(dataclasses.replace(reward, value=value))
      else:
        self.fail(f"reward {reward.name!r} is {value} and was dropped")


def _as_json(messages: types.Messages) -> tuple[types.Message, ...]:
  """The transcript as plain JSON values, which is what the pool keeps."""
  return tuple(json.loads(json.dumps([dict(m) for m in messages])))


def _describe(failure: BaseException) -> str:
  return f"{type(failure).__name__}: {failure}"


async def _verdict(
  rewards: Callable[[], Sequence[types.Reward] | Awaitable],
) -> Sequence[types.Reward]:
  """What a verifier says; one that never ends costs a thread, not the loop.

  Not a thread of an executor: a few hung verifiers would use all of those up.
  """
  if inspect.iscoroutinefunction(rewards):
    return await rewards()
  verdict: concurrent.futures.Future = concurrent.futures.Future()
  verdict.set_running_or_notify_cancel()

  def work() -> None:
    try:
      verdict.set_result(rewards())
    except BaseException as failure:  # all of it is the episode's to keep
      verdict.set_exception(failure)

  thread = threading.Thread(target=work, name="verifier", daemon=True)
  thread.start()
  # Most answer at once. They keep their place in the order of episodes, so
  # that a run can be repeated.
  thread.join(_AT_ONCE)
  if verdict.done():
    return verdict.result()
  return await asyncio.wrap_future(verdict)


async def _persist[T](call: Callable[[], Awaitable[T]]) -> T:
  """Calls the gateway until it answers, or has failed too often."""
  for delay in _RETRY_DELAYS:
    try:
      return await call()
    except errors.GatewayError:
      await asyncio.sleep(delay)
  return await call()
