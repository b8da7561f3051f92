"""The pool of a run, from its configuration; nothing imports JAX."""

from collections.abc import Mapping
import pathlib
from typing import Any

from forge_jax import errors, settings
from forge_jax.pool import compaction, postgres, store
from forge_jax.pool import tickets as tickets_lib


class PoolSide:
  """Where the pool's index is, and what stays in the pool."""

  def __init__(self, values: Mapping[str, Any]):
    """Reads a resolved configuration.

    Raises:
      ConfigError: an unknown key, or a value that cannot work.
    """
    self._config, self._shared, self.retention = settings.shared_section(
      values["pool"],
      "pool",
      (store.PoolConfig, {}),
      (postgres.SharedConfig, {}),
      (compaction.Retention, {}),
    )
    curated, keep = values["curation"], self.retention.keep_steps
    if curated["replay"] and 0 <= keep < curated["replay_steps"]:
      raise errors.ConfigError(
        f"config.pool.keep_steps={keep} drops groups that "
        f"config.curation.replay_steps={curated['replay_steps']} replays"
      )

  @property
  def shared(self) -> bool:
    """Whether hosts of other processes fill the pool."""
    return bool(self._shared.database)

  @property
  def lease_seconds(self) -> float:
    """After which a silent host's item goes to another."""
    return self._shared.lease_seconds

  def open(
    self, folder: pathlib.Path, *, leased: bool = False
  ) -> store.DataPool:
    """Opens the pool for writing; `leased` as for `postgres.open_pool`.

    Raises:
      PoolError: it cannot be opened.
    """
    if not self.shared:
      return store.DataPool.open(folder, self._config)
    database = self._connect()
    try:
      return postgres.open_pool(folder, database, self._config, leased=leased)
    except errors.PoolError:
      database.close()
      raise

  def tickets(self) -> tickets_lib.Tickets:
    """The tickets of a shared pool, over a connection of their own.

    Raises:
      PoolError: the database cannot be used.
    """
    return tickets_lib.Tickets(self._connect())

  def _connect(self) -> postgres.Postgres:
    return postgres.Postgres(self._shared.database, self._shared.schema)
