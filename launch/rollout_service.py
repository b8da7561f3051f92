"""A rollout host in a process of its own. Nothing here imports JAX."""

import asyncio
import contextlib
import json
import logging
import pathlib
import signal

from forge_jax import errors, paths
from forge_jax.gateway import client
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.rollout import episode, host, leases
from launch import keys, pool_side, rollout_side

_LOG = logging.getLogger(__name__)
_PAUSE = 5.0  # seconds before gateway and database are tried again


class RolloutService:
  """Rolls out what a run's trainer puts on offer, until a signal ends it.

  What tasks, agent, pool and deadlines are is read from the run's folder, so
  that no host can differ from its trainer.
  """

  def __init__(
    self,
    workdir: str,
    gateway: str,
    name: str = "",
    ca_file: str | None = None,
  ):
    """Checks the run's configuration; connects to nothing yet.

    Args:
      workdir: of the run, on a path that the hosts share.
      gateway: its URL.
      name: of this host, unique; "": made of host and process.
      ca_file: see `GatewayClient`.

    Raises:
      ConfigError: there is no run, its pool is not shared, or the gateway's
        token is not in the environment.
    """
    self._workdir = pathlib.Path(workdir)
    path = self._workdir / "config.json"
    if not path.exists():
      raise errors.ConfigError(
        f"{path} does not exist: start the trainer first, on a shared path"
      )
    values = json.loads(path.read_text(encoding="utf-8"))
    self._side = rollout_side.RolloutSide(values)
    self._pool = pool_side.PoolSide(values)
    if not self._pool.shared:
      raise errors.ConfigError(
        f"the run in {workdir} has config.pool.database='': its pool is "
        "embedded, and only its trainer's process rolls out"
      )
    self._model_name = values["gateway"]["model_name"]
    tokenizer = tokenizer_lib.load_tokenizer(
      paths.resolve_model_path(values["model"]["path"])
    )
    self._process = self._side.process_rewards(tokenizer.decode)
    self._gateway = gateway, keys.admin_token(), ca_file
    rollout = self._side.rollout
    # As many groups as its permits can work on.
    self._leases = leases.LeaseConfig(
      most=-(-rollout.permits // rollout.group_size),
      seconds=self._pool.lease_seconds,
      **{"host": name} if name else {},
    )

  async def run(self) -> None:
    """Rolls out; SIGTERM and Ctrl-C give back what is not completed.

    A gateway or a database that goes away once it was there is waited for.

    Raises:
      ForgeError: the database or the pool cannot be used at the start.
    """
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
      loop.add_signal_handler(number, ended.set)
    stop = asyncio.create_task(ended.wait())
    begun = False
    while not ended.is_set():
      work = asyncio.create_task(self._work())
      await asyncio.wait((stop, work), return_when=asyncio.FIRST_COMPLETED)
      work.cancel()
      try:
        await work
      except asyncio.CancelledError:
        break
      except _Away as away:
        if away.at_start and not begun:
          raise away.error from away
        begun = True
        _LOG.warning("%s; trying again in %g s", away.error, _PAUSE)
      with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(stop), _PAUSE)
    print(f"rollout host {self._leases.host} has ended", flush=True)

  async def _work(self) -> None:
    """Connects and rolls out until it is cancelled or something is away."""
    at_start = True
    try:
      async with contextlib.AsyncExitStack() as stack:
        pool = self._pool.open(self._workdir / "pool", leased=True)
        stack.callback(pool.close)
        tickets = self._pool.tickets()
        stack.callback(tickets.close)
        at_start = False
        gateway = client.GatewayClient(
          self._gateway[0], self._gateway[1], ca_file=self._gateway[2]
        )
        stack.push_async_callback(gateway.aclose)
        agent = self._side.make_agent(stack)
        leased = leases.Leases(pool, tickets, self._leases)
        worker = host.RolloutHost(
          self._side.rollout,
          self._side.mixture,
          agent,
          gateway,
          leased,
          self._model_name,
          self._process,
        )
        print(f"rollout host {self._leases.host} waits for work", flush=True)
        async with asyncio.TaskGroup() as both:
          both.create_task(worker.run(), name="host")
          both.create_task(leased.renew(), name="leases")
    except errors.ForgeError as error:
      raise _Away(error, at_start) from error
    except ExceptionGroup as failures:
      failure = episode.first_failure(failures)
      if not isinstance(failure, errors.ForgeError):
        raise
      raise _Away(failure, at_start) from failure


class _Away(Exception):
  """Gateway, database or pool could not be used."""

  def __init__(self, error: errors.ForgeError, at_start: bool):
    super().__init__(str(error))
    self.error = error
    self.at_start = at_start  # nothing had been opened yet
