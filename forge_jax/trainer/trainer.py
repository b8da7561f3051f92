"""The trainer: takes prepared batches, updates; publishes weights.

Invariants:
  - `step` counts trainer steps taken; the weights' version is `step`.
  - A step takes its groups in the order of the batch and makes `minibatches`
    updates, each normalised by its own groups' response tokens.
  - After `take_step` returns, the state is that of step + 1 and the old
    one's buffers are gone: published weights must be copies.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import errors, types
from forge_jax.observe import names
from forge_jax.trainer import credit, mismatch, preparation, update
from forge_jax.tree import cost as cost_lib
from forge_jax.tree import pack as pack_lib

_LOG = logging.getLogger(__name__)
_UNPUBLISHED = -2  # a version that no token carries


@dataclasses.dataclass(frozen=True)
class TrainerConfig(mismatch.MismatchConfig):
  """What one trainer step is, and how far it trusts the engine."""

  groups_per_step: int = 8
  minibatches: int = 2  # optimizer updates of a step
  prepare_ahead: int = 1  # batches kept ready beside the one being made; 0:
  # each is made when the step before it is over

  def __post_init__(self):
    super().__post_init__()
    if self.prepare_ahead < 0:
      raise errors.ConfigError(
        f"prepare_ahead is {self.prepare_ahead}; expected at least 0"
      )
    if self.groups_per_step % self.minibatches:
      raise errors.ConfigError(
        f"minibatches={self.minibatches} does not divide "
        f"groups_per_step={self.groups_per_step}"
      )


class Trainer:
  """Holds the training state and takes steps."""

  def __init__(
    self,
    updater: update.Updater,
    config: TrainerConfig,
    credit_config: credit.CreditConfig,
    pack_config: pack_lib.PackConfig,
    *,
    vocab_size: int,
  ):
    """A trainer at step 0 with the updater's initial state."""
    self.config = config
    self.step = 0
    self.state = updater.initial_state()
    self._updater = updater
    flops = updater.decoder(self.state).config.flops()
    self.prepare = preparation.Preparation(
      config.minibatches,
      credit_config,
      pack_config,
      vocab_size,
      cost_lib.Cost(flops.token, flops.pair, flops.edge),
    )
    self._shapes: set[tuple[int, ...]] = set()  # of device batches so far

  def weights(self) -> types.WeightsVersion:
    """The current weights; copy them before the next step."""
    return types.WeightsVersion(self.step, params=self.state.params)

  def restore(self, step: int, state: update.TrainState) -> None:
    """Continues from a checkpoint."""
    self.step, self.state = step, state

  def take_step(
    self,
    batch: preparation.StepBatch,
    *,
    give_up: Callable[[], None] = lambda: None,
  ) -> dict[str, Any]:
    """One trainer step.

    Args:
      batch: what `prepare` made of `groups_per_step` groups.
      give_up: called while nothing of the state has changed; what it raises
        ends the step, and the trainer is as before.

    Returns:
      Metrics by name; values may still be computing on the device.

    Raises:
      MismatchError: engine and trainer differ by more than the config allows;
        nothing of the state has changed.
    """
    sums, norms = None, []
    for i, batches in enumerate(batch.updates):
      if not batches:
        continue  # every advantage is 0: there is no gradient
      gradient, new = self._accumulate(
        batches,
        # Only the first update starts from the weights of version `step`.
        self.step if i == 0 else _UNPUBLISHED,
        give_up if not norms else lambda: None,
      )
      if i == 0:
        mismatch.watch(
          new, batches, self._row_logprobs, self.config, step=self.step
        )
      sums = new if sums is None else update.merge_sums(sums, new)
      self.state, norm = self._updater.apply(self.state, gradient)
      norms.append(norm)
    # The host's figures are made while the device still computes.
    if batch.sharing.collapsed:
      _LOG.warning("step %d: %s", self.step + 1, batch.sharing)
    metrics: dict[str, Any] = batch.metrics(self.step, self.prepare.cost)
    metrics[names.TREE_SHAPES] = len(self._shapes)
    jax.block_until_ready(self.state)
    if sums is not None:
      metrics |= _loss_metrics(sums, len(norms))
      metrics[names.TRAIN_GRAD_NORM] = sum(norms) / len(norms)
    self.step += 1
    return metrics

  def _accumulate(
    self,
    batches: Sequence[types.PackedBatch],
    version: int,
    give_up: Callable[[], None],
  ) -> tuple[Any, dict[str, Any]]:
    """The gradient of an update and its sums, over all device batches."""
    gradient, sums = self._updater.zero_gradient(self.state), None
    for batch in batches:
      self._note_shape(batch)
      give_up()
      before = sums
      gradient, new = self._updater.accumulate(
        self.state, gradient, batch, version
      )
      sums = new if sums is None else update.merge_sums(sums, new)
      # At most two batches are on their way, so that giving up is soon over.
      jax.block_until_ready(before)
    return gradient, sums

  def _row_logprobs(self, batch: types.PackedBatch) -> np.ndarray:
    return np.asarray(self._updater.row_logprobs(self.state.params, batch)[0])

  def _note_shape(self, batch: types.PackedBatch) -> None:
    edges, rows = batch.edge_token_BE.shape[1], batch.row_edge_BM.shape[1]
    shape = (*batch.tokens_BT.shape, edges, rows)
    if shape not in self._shapes:
      self._shapes.add(shape)
      _LOG.info(
        "new shape of device batches: %d packs of %d tokens, %d edges, %d rows",
        *shape,
      )


def _loss_metrics(sums: Mapping[str, Any], updates: int) -> dict[str, Any]:
  """Means over the trained tokens, from sums on the device."""
  count = sums["count"]
  # Where no token was sampled from exactly these weights, 0 / 1.
  same = sums["same_version"] + (sums["same_version"] == 0)
  return {
    names.TRAIN_LOSS: sums["loss"] / updates,
    names.TRAIN_ENTROPY: sums["entropy"] / count,
    names.RATIO_MEAN: sums["ratio"] / count,
    names.RATIO_STD: jnp.sqrt(
      jnp.maximum(
        sums["ratio_squared"] / count - (sums["ratio"] / count) ** 2, 0.0
      )
    ),
    names.RATIO_EFFECTIVE: sums["ratio"] ** 2 / sums["ratio_squared"] / count,
    names.RATIO_MAX: sums["ratio_max"],
    names.RATIO_CLIPPED: sums["clipped"] / count,
    names.MISMATCH_MEAN: sums["mismatch"] / same,
    names.MISMATCH_MAX: sums["mismatch_max"],
  } | _draft_metrics(sums)


def _draft_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
  """Means over the trained tokens of each module that drafts."""
  return {
    f"{name}_{number}": total / weight
    for name, key in ((names.MTP_KL, "kl"), (names.MTP_ACCEPTED, "accepted"))
    for number, (total, weight) in enumerate(
      zip(sums.get(f"mtp_{key}", ()), sums.get("mtp_weight", ()), strict=True),
      start=1,
    )
  }
