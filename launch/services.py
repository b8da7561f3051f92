"""The rollout side of a run in one process: engine, gateway, agent, host.

The engine runs on its own thread; the gateway, the agents and the host share
one asyncio loop on another. The trainer stays on the main thread and calls in
here. Entering starts everything, leaving stops everything, whatever happened.
"""

import asyncio
from collections.abc import Coroutine, Mapping
import threading
from typing import Any

from forge_jax.agents import context, react
from forge_jax.engine import engine as engine_lib
from forge_jax.gateway import client, server
from forge_jax.pool import queue as queue_lib
from forge_jax.rollout import evaluation, host
from forge_jax.tasks import base as tasks_base
from forge_jax.tasks import mixture as mixture_lib


class Services:
  """What produces episodes; a context manager."""

  def __init__(
    self,
    engine: engine_lib.JaxEngine,
    tokenizer: Any,
    gateway_config: server.GatewayConfig,
    agent_config: react.ReactConfig,
    context_config: context.ContextConfig,
    rollout_config: host.RolloutConfig,
    domains: Mapping[str, tasks_base.Domain],
  ):
    self.engine = engine
    self._gateway_config = gateway_config
    self._agent_config = agent_config
    self._context_config = context_config
    self._rollout = rollout_config
    self._domains = domains
    self._gateway = server.Gateway(engine, tokenizer, gateway_config)
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=self._loop.run_forever, name="asyncio", daemon=True
    )
    self._host: host.RolloutHost | None = None
    self._host_task: asyncio.Task | None = None

  def __enter__(self):
    self.engine.start()
    self._thread.start()
    try:
      self._call(self._start())
    except BaseException:
      self._stop_loop()
      self.engine.stop()
      raise
    return self

  def __exit__(self, *_):
    try:
      self._call(self._stop())
    finally:
      self._stop_loop()
      self.engine.stop()

  def start_host(
    self, mixture: mixture_lib.TaskMixture, queue: queue_lib.GroupQueue
  ) -> None:
    """Begins to fill the queue, until the services stop."""
    self._call(self._start_host(mixture, queue))

  def host_stats(self) -> Mapping[str, float]:
    """The host's counts; empty before it starts."""
    return self._host.stats() if self._host else {}

  def evaluate(self, split: str, count: int) -> evaluation.EvalResult:
    """Plays a split's first tasks greedily with the engine's weights.

    It leaves no trace in the engine's cache: training goes on, to the last
    bit, as it would have without it.
    """
    result = self._call(
      evaluation.evaluate(
        list(self._domains.values()),
        split,
        count,
        self._agent,
        self._client,
        model_name=self._gateway_config.model_name,
        permits=self._rollout.permits,
        deadline_seconds=self._rollout.deadline_seconds,
      )
    )
    self.engine.flush_cache()
    return result

  async def _start(self) -> None:
    await self._gateway.start()
    self._client = client.GatewayClient(
      self._gateway.url, self._gateway.admin_token
    )
    self._agent = react.ReactAgent(
      self._agent_config, context=self._context_config
    )

  async def _start_host(self, mixture, queue) -> None:
    self._host = host.RolloutHost(
      self._rollout,
      mixture,
      self._agent,
      self._client,
      queue,
      self._gateway_config.model_name,
    )
    self._host_task = asyncio.create_task(self._host.run(), name="host")

  async def _stop(self) -> None:
    if self._host_task is not None:
      self._host_task.cancel()
      # A failure of the host has reached the trainer through the queue.
      await asyncio.gather(self._host_task, return_exceptions=True)
    await self._agent.aclose()
    await self._client.aclose()
    await self._gateway.stop()

  def _call[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the loop from another thread."""
    future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
    try:
      return future.result()
    except BaseException:
      future.cancel()  # Ctrl-C here must not leave it running
      raise

  def _stop_loop(self) -> None:
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()
