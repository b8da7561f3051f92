"""The watch over what must not differ: engine and trainer on the same weights.

Both compute the log-probability of a token that the engine sampled from the
very weights that the trainer holds. To rounding the two agree; where they do
not, ratios and gradients mean nothing. Causes are a cache that outlived an
update, weights that did not arrive, another rotary base, a narrower dtype.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
from typing import Any

import numpy as np

from forge_jax import errors, types

_LOG = logging.getLogger(__name__)
_SHOWN = 5  # worst tokens in the message
_CONTEXT = 6  # tokens shown before each


@dataclasses.dataclass(frozen=True)
class MismatchConfig:
  """Limits on the mean of |engine's - trainer's log-probability|, nats.

  Requests that sample at another temperature than 1, or filter, differ on
  purpose; a run of such needs higher limits.
  """

  mismatch_warn: float = 0.1
  mismatch_stop: float = 1.0  # before the update; float("inf"): never

  def __post_init__(self):
    if not 0 <= self.mismatch_warn <= self.mismatch_stop:
      raise errors.ConfigError(
        f"trainer.mismatch_warn={self.mismatch_warn} and mismatch_stop="
        f"{self.mismatch_stop}; expected 0 <= warn <= stop"
      )


def watch(
  sums: Mapping[str, Any],
  batches: Sequence[types.PackedBatch],
  logprobs: Callable[[types.PackedBatch], np.ndarray],
  config: MismatchConfig,
  *,
  step: int,
) -> None:
  """Warns of a mismatch, or stops the run at a large one.

  Args:
    sums: of an update; see `Updater.accumulate`.
    batches: its device batches.
    logprobs: the trainer's log-probabilities [B, M] of a batch's rows, with the
      weights of version `step`.
    config: the limits.
    step: whose weights sampled the tokens that count.

  Raises:
    MismatchError: the mean is over the second limit; the worst tokens are in
      the message.
  """
  count = float(sums["same_version"])
  mean = float(sums["mismatch"]) / max(count, 1.0)
  if mean <= config.mismatch_warn:
    return
  message = (
    f"step {step + 1}: engine and trainer disagree by {mean:.3g} nats a token, "
    f"{float(sums['mismatch_max']):.3g} at most, on {count:.0f} tokens that the "
    f"weights of version {step} sampled"
  )
  if mean <= config.mismatch_stop:
    _LOG.warning("%s; the limit is %g", message, config.mismatch_warn)
    return
  worst = sorted(
    (found for batch in batches for found in _worst(batch, logprobs, step)),
    reverse=True,
  )
  raise errors.MismatchError(
    f"{message}; the limit trainer.mismatch_stop is {config.mismatch_stop:g}. "
    f"The worst: {'; '.join(text for _, text in worst[:_SHOWN])}"
  )


def _worst(
  batch: types.PackedBatch,
  logprobs: Callable[[types.PackedBatch], np.ndarray],
  version: int,
) -> list[tuple[float, str]]:
  """The largest differences of a batch, and what to say of each."""
  ours_BM = np.asarray(logprobs(batch))
  same_BM = (batch.version_BM == version) & (batch.weight_BM != 0)
  error_BM = np.where(same_BM, np.abs(ours_BM - batch.old_logprob_BM), -1.0)
  found = []
  for flat in np.argsort(-error_BM, axis=None)[:_SHOWN]:
    b, m = np.unravel_index(flat, error_BM.shape)
    if error_BM[b, m] >= 0:
      found.append(
        (
          float(error_BM[b, m]),
          f"token {_place(batch, b, m)}: engine {batch.old_logprob_BM[b, m]:.4g}"
          f", trainer {ours_BM[b, m]:.4g}",
        )
      )
  return found


def _place(batch: types.PackedBatch, b: int, m: int) -> str:
  """A row's token, where it stands and what stands before it."""
  edge = batch.row_edge_BM[b, m]
  node = batch.edge_parent_BE[b, edge]
  position = batch.position_BT[b, node] + 1
  before = []
  while node >= 0 and len(before) < _CONTEXT:
    before.append(int(batch.tokens_BT[b, node]))
    node = batch.parent_BT[b, node]
  return (
    f"{batch.edge_token_BE[b, edge]} at position {position} "
    f"after {before[::-1]}"
  )
