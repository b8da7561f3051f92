"""The rollout side of a run in one process: engine, gateway, agent, host.

The engine runs on its own thread; the gateway, the agents and the host share
one asyncio loop on another. The trainer stays on the main thread and calls in
here. Entering starts everything, leaving stops everything, whatever happened.
"""

import asyncio
from collections.abc import Coroutine, Mapping
import contextlib
import threading
from typing import Any

from forge_jax.engine import engine as engine_lib
from forge_jax.gateway import client, server
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import tickets as tickets_lib
from forge_jax.rollout import evaluation, host, offers
from launch import rollout_side, teacher


class Services:
  """What produces episodes; a context manager."""

  def __init__(
    self,
    engine: engine_lib.JaxEngine | teacher.TeacherEngine,
    tokenizer: Any,
    gateway_config: server.GatewayConfig,
    side: rollout_side.RolloutSide,
    tickets: tickets_lib.Tickets | None = None,
  ):
    """Builds everything; with `tickets`, hosts of other processes roll out."""
    self.engine = engine
    self._gateway_config = gateway_config
    self._side = side
    self._process = side.process_rewards(tokenizer.decode)
    self._closing = contextlib.AsyncExitStack()  # what agents hold
    self._tickets = tickets
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

  @property
  def gateway_url(self) -> str:
    """Where agents reach the gateway."""
    return self._gateway.url

  def start_host(self, queue: queue_lib.GroupQueue) -> None:
    """Begins to fill the queue, or to let others, until the services stop."""
    self._call(self._start_host(queue))

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
        list(self._side.domains.values()),
        split,
        count,
        self._evaluated,
        self._client,
        model_name=self._gateway_config.model_name,
        permits=self._side.rollout.permits,
        deadline_seconds=self._side.rollout.deadline_seconds,
      )
    )
    self.engine.flush_cache()
    return result

  async def _start(self) -> None:
    await self._gateway.start()
    self._client = client.GatewayClient(
      self._gateway.url, self._gateway.admin_token
    )
    side = self._side
    self._agent = self._evaluated = side.make_agent(self._closing)
    if side.evaluated is not side.lineup:
      self._evaluated = side.make_agent(self._closing, side.evaluated)

  async def _start_host(self, queue) -> None:
    if self._tickets is not None:
      filling = offers.Offers(queue, self._tickets).run()
    else:
      self._host = host.RolloutHost(
        self._side.rollout,
        self._side.mixture,
        self._agent,
        self._client,
        queue,
        self._gateway_config.model_name,
        self._process,
      )
      filling = self._host.run()
    self._host_task = asyncio.create_task(filling, name="host")

  async def _stop(self) -> None:
    if self._host_task is not None:
      self._host_task.cancel()
      # A failure of the host has reached the trainer through the queue.
      await asyncio.gather(self._host_task, return_exceptions=True)
    await self._closing.aclose()
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
