"""The device side of a trainer step: gradients of packs, then one update.

Two jitted functions at static shapes: `accumulate` adds the gradient of one
device batch of packs to a buffer, `apply` turns the buffer into an optimizer
update. The loss is a sum over rows whose weights carry the normaliser, so a
step may be spread over any number of device batches.
"""

from collections.abc import Mapping
import dataclasses
import logging

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from forge_jax import errors, types
from forge_jax.algo import cispo, grpo, mtp
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp as mtp_lib
from forge_jax.model import sharding
from forge_jax.tree import attention as tree_attention
from forge_jax.tree import unmerge

_LOG = logging.getLogger(__name__)
LOSSES = {"cispo": cispo.cispo_loss, "grpo_clip": grpo.grpo_loss}


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """The optimizer and the loss.

  A model's multi-token-prediction modules are optimised by themselves: their
  gradient neither reaches the policy nor counts in its norm.

  Optimizer defaults are M1's (arXiv 2506.13585, section 4.1) but for the
  learning rate, which depends on the model.
  """

  learning_rate: float = 2e-5
  warmup_updates: int = 0  # linear, from 0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-15
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  loss: str = "cispo"  # or "grpo_clip", whose paper has ratios in [0.8, 1.2]
  ratio_min: float = 0.0
  ratio_max: float = 5.0
  attention: str = "auto"  # see tree.attention; auto: the mesh's fastest
  block: int = 128  # tokens of an attention block, as packed
  head_chunk: int = 256  # edges whose logits exist at a time
  remat: str = "elementwise"  # see model.decoder.REMAT: "elementwise", "layer"
  mtp_learning_rate: float = 1e-4  # of the modules that draft; 0 freezes them
  mtp_top_k: int = 64  # tokens of the policy that drafts are trained towards

  def __post_init__(self):
    if self.loss not in LOSSES:
      raise errors.ConfigError(
        f"trainer.loss={self.loss!r}; expected one of {list(LOSSES)}"
      )
    if self.attention not in tree_attention.NAMES:
      raise errors.ConfigError(
        f"trainer.attention={self.attention!r}; expected one of "
        f"{list(tree_attention.NAMES)}"
      )
    if self.remat not in decoder_lib.REMAT:
      raise errors.ConfigError(
        f"trainer.remat={self.remat!r}; expected one of {list(decoder_lib.REMAT)}"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a step changes and a checkpoint holds."""

  params: nnx.State
  opt_state: optax.OptState


def make_optimizer(config: UpdateConfig) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping, for the policy and for its drafts."""

  def adamw(peak: float) -> optax.GradientTransformation:
    rate = optax.linear_schedule(
      0.0 if config.warmup_updates else peak,
      peak,
      max(config.warmup_updates, 1),
    )
    return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
      ),
    )

  def part(path, leaf) -> str:
    del leaf
    return "drafts" if mtp_lib.of_module(path) else "policy"

  return optax.partition(
    {
      "policy": adamw(config.learning_rate),
      "drafts": adamw(config.mtp_learning_rate),
    },
    lambda params: jax.tree_util.tree_map_with_path(part, params),
  )


def merge_sums(
  a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """Metric sums of two device batches together; `*_max` are maxima."""
  return {
    name: jnp.maximum(a[name], b[name])
    if name.endswith("_max")
    else a[name] + b[name]
    for name in a
  }


class Updater:
  """The jitted functions of a step, for one decoder, config and mesh."""

  def __init__(
    self, decoder: decoder_lib.Decoder, config: UpdateConfig, mesh: Mesh
  ):
    """Splits the decoder over the mesh; `initial_state` returns its weights.

    Logs the implementation of tree attention that the mesh's devices get.

    Raises:
      ConfigError: the mesh does not divide the model.
    """
    sharding.check_divisible(decoder.config, mesh)
    self.config = config
    self.mesh = mesh
    self.traces = 0  # of `accumulate`, for tests
    platform = mesh.devices.flat[0].platform
    self.attention = tree_attention.resolve(config.attention, platform)
    _LOG.info("tree attention: %s (%s)", self.attention, platform)
    self._graph, self._params = nnx.split(decoder)
    self._optimizer = make_optimizer(config)
    # Placements are spelled out, so that a step's outputs fit the next step's
    # inputs exactly and nothing is ever compiled twice.
    opt_state = jax.eval_shape(self._optimizer.init, self._params)
    params_at = sharding.placements(self._params, mesh)
    state_at = TrainState(params_at, sharding.placements(opt_state, mesh))
    whole = NamedSharding(mesh, P())
    self._accumulate = jax.jit(
      self._accumulate_fn,
      donate_argnums=(1,),
      out_shardings=(params_at, whole),
    )
    self._apply = jax.jit(
      self._apply_fn, donate_argnums=(0,), out_shardings=(state_at, whole)
    )
    self._zeros = jax.jit(
      lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=params_at
    )
    self._init = jax.jit(self._optimizer.init, out_shardings=state_at.opt_state)

  def initial_state(self) -> TrainState:
    """The decoder's weights and a fresh optimizer, placed on the mesh.

    May be called once: the weights move into the state, which is donated from
    update to update.
    """
    params = sharding.place(self._params, self.mesh)
    self._params = None
    return TrainState(params, self._init(params))

  def decoder(self, state: TrainState) -> decoder_lib.Decoder:
    """The decoder with a state's weights; shares their buffers."""
    return nnx.merge(self._graph, state.params)

  def zero_gradient(self, state: TrainState) -> nnx.State:
    """An empty gradient buffer."""
    return self._zeros(state.params)

  def accumulate(
    self,
    state: TrainState,
    gradient: nnx.State,
    batch: types.PackedBatch,
    version: int,
  ) -> tuple[nnx.State, dict[str, jax.Array]]:
    """Adds a device batch's gradient to a buffer, which is donated.

    Args:
      state: current weights.
      gradient: buffer to add to.
      batch: packs; B must be a multiple of the mesh's data axes.
      version: the weights' version, which selects the tokens of the mismatch
        figures; one that no token carries for weights never published.

    Returns:
      The buffer and the batch's metric sums, float32; see `merge_sums`. They
      are scalars, but for the drafts' `mtp_*`, one figure a module.
    """
    batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))
    return self._accumulate(state.params, gradient, batch, jnp.int32(version))

  def lower(
    self, state: TrainState, gradient: nnx.State, batch: types.PackedBatch
  ) -> jax.stages.Lowered:
    """`accumulate` lowered for these shapes, to inspect or compile ahead."""
    return self._accumulate.lower(state.params, gradient, batch, jnp.int32(0))

  def apply(
    self, state: TrainState, gradient: nnx.State
  ) -> tuple[TrainState, jax.Array]:
    """One optimizer update; donates the state.

    Also returns the norm of the policy's gradient.
    """
    return self._apply(state, gradient)

  def _apply_fn(self, state, gradient):
    updates, opt_state = self._optimizer.update(
      gradient, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    policy = [
      x
      for path, x in jax.tree_util.tree_leaves_with_path(gradient)
      if not mtp_lib.of_module(path)
    ]
    return TrainState(params, opt_state), optax.tree.norm(policy)

  def _accumulate_fn(self, params, gradient, batch, version):
    self.traces += 1
    (_, sums), grads = jax.value_and_grad(self._loss, has_aux=True)(
      params, batch, version
    )
    return jax.tree.map(jnp.add, gradient, grads), sums

  def _loss(self, params, batch: types.PackedBatch, version):
    """Loss (a sum over rows) and metric sums of a device batch."""
    hidden_BTD = self._hidden(params, batch)
    logprob_BM, entropy_BE = self._row_logprobs(params, hidden_BTD, batch)
    loss, sums = LOSSES[self.config.loss](
      logprob_BM,
      batch.old_logprob_BM,
      batch.advantage_BM,
      batch.weight_BM,
      ratio_min=self.config.ratio_min,
      ratio_max=self.config.ratio_max,
    )
    error_BM = jnp.abs(logprob_BM - batch.old_logprob_BM)
    same_BM = (batch.version_BM == version) & (batch.weight_BM != 0)
    error_BM = jnp.where(same_BM, error_BM, 0.0)
    entropy_BM = jnp.take_along_axis(entropy_BE, batch.row_edge_BM, axis=1)
    sums |= {
      "entropy": jnp.where(batch.weight_BM != 0, entropy_BM, 0.0).sum(),
      "mismatch": error_BM.sum(),
      "mismatch_max": error_BM.max(),
      "same_version": same_BM.sum(),
      "loss": loss,
    }
    draft_loss, draft_sums = self._draft_loss(params, hidden_BTD, batch)
    sums |= draft_sums
    return loss + draft_loss, jax.tree.map(jax.lax.stop_gradient, sums)

  def _draft_loss(self, params, hidden_BTD, batch: types.PackedBatch):
    """The modules' loss, a sum over rows, and its sums; 0 without modules."""
    decoder = nnx.merge(self._graph, mtp_lib.detached(params))
    if not decoder.mtp:
      return 0.0, {}
    hidden_BTD = jax.lax.stop_gradient(hidden_BTD)
    drafts = mtp_lib.hidden(
      decoder,
      hidden_BTD,
      batch.tokens_BT,
      batch.parent_BT,
      batch.position_BT,
      self._attend(batch.layout),
    )
    by_module = unmerge.edge_draft_losses(
      hidden_BTD,
      drafts,
      batch.edge_parent_BE,
      batch.edge_token_BE,
      decoder.logits,
      lambda policy, draft: mtp.draft_loss(
        policy, draft, self.config.mtp_top_k
      ),
      chunk=self.config.head_chunk,
    )
    depth_BE = jnp.take_along_axis(
      batch.position_BT, batch.edge_parent_BE, axis=1
    )
    totals = []
    for module, figures in enumerate(by_module):
      known_BE = depth_BE > module  # else it has no state to draft from
      known_BM = unmerge.by_row(known_BE, batch.row_edge_BM)
      weight_BM = jnp.where(known_BM, batch.weight_BM, 0.0)
      totals.append(
        [weight_BM.sum()]
        + [
          (weight_BM * unmerge.by_row(x_BE, batch.row_edge_BM)).sum()
          for x_BE in figures
        ]
      )
    weight, kl, accepted = (jnp.stack(x) for x in zip(*totals, strict=True))
    sums = {"mtp_weight": weight, "mtp_kl": kl, "mtp_accepted": accepted}
    return kl.sum(), sums

  def row_logprobs(
    self, params: nnx.State, batch: types.PackedBatch
  ) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, M] of the rows and entropies [B, E] in nats."""
    return self._row_logprobs(params, self._hidden(params, batch), batch)

  def _hidden(self, params: nnx.State, batch: types.PackedBatch):
    return nnx.merge(self._graph, params).hidden(
      batch.tokens_BT,
      batch.position_BT,
      self._attend(batch.layout),
      remat=self.config.remat,
    )

  def _row_logprobs(self, params, hidden_BTD, batch: types.PackedBatch):
    decoder = nnx.merge(self._graph, params)
    logprob_BE, entropy_BE = unmerge.edge_logprobs(
      hidden_BTD,
      batch.edge_parent_BE,
      batch.edge_token_BE,
      decoder.logits,
      chunk=self.config.head_chunk,
    )
    return unmerge.by_row(logprob_BE, batch.row_edge_BM), entropy_BE

  def _attend(self, layout: types.TreeLayout):
    """Tree attention, each device on its own packs and heads."""
    heads = P(sharding.BATCH_AXES, None, "tensor")

    def attend(q, k, v):
      return jax.shard_map(
        lambda q, k, v, layout: tree_attention.tree_attention(
          q,
          k,
          v,
          layout,
          block=self.config.block,
          implementation=self.attention,
        ),
        mesh=self.mesh,
        in_specs=(heads, heads, heads, P(sharding.BATCH_AXES)),
        out_specs=heads,
        check_vma=False,
      )(q, k, v, layout)

    return attend
