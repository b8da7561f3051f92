"""The chain of hooks that a configuration asks for."""

from collections.abc import Callable

from forge_jax import types
from forge_jax.pool import curation, edits, filters
from forge_jax.pool import store as store_lib


def build(
  config: curation.CurationConfig,
  pool: store_lib.DataPool,
  trains: Callable[[types.Group], bool],
) -> curation.Curation:
  """The hooks in the order in which they look: edits before filters.

  Args:
    config: which.
    pool: where later scores are.
    trains: whether a group has an advantage other than 0.
  """
  hooks: list[curation.Hook] = []
  if config.rescore:
    hooks.append(edits.Rescore(pool))
  if config.overlong != "keep":
    hooks.append(
      edits.Overlong(
        config.overlong, config.overlong_tokens, config.overlong_margin
      )
    )
  if config.min_tokens or config.max_tokens:
    hooks.append(filters.Length(config.min_tokens, config.max_tokens))
  if config.max_mean_lag:
    hooks.append(filters.Staleness(config.max_mean_lag))
  if config.zero_variance:
    hooks.append(filters.ZeroVariance(trains))
  if config.duplicates != "keep":
    hooks.append(
      filters.Duplicates(config.duplicates, config.duplicate_horizon)
    )
  if config.quotas:
    hooks.append(filters.Quotas(config.quotas))
  return curation.Curation(hooks, config.resubmit)
