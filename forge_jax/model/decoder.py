"""The decoder: one set of layers, run scanned by the trainer or unrolled by
the engine (`UnrolledDecoder`).

Parameters live under '/'-joined names, the contract with every file format:

  embed/embedding [V, D]                  final_norm/scale [D]
  head/embedding [V, D]                   (absent when embeddings are tied)
  layers/attention_norm/scale [L, D]      layers/mlp_norm/scale [L, D]
  layers/attention/query/kernel [L, D, H*C]        (+ bias, as configured)
  layers/attention/{key,value}/kernel [L, D, K*C]  (+ bias)
  layers/attention/out/kernel [L, H*C, D]          (+ bias)
  layers/attention/{query_norm,key_norm}/scale [L, C]   (with qk_norm)
  layers/mlp/{gate,up}/kernel [L, D, F]   layers/mlp/down/kernel [L, F, D]

and, of each module n that predicts a further token (`mtp.py`):

  mtp/<n>/{embed_norm,hidden_norm,final_norm}/scale [D]
  mtp/<n>/project/kernel [2D, D]          rows: the token's half, the state's
  mtp/<n>/layer/...                       as in layers/..., without L
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import layers as layers_lib
from forge_jax.model import rope

_policies = jax.checkpoint_policies
# How a layer is rematerialised, by name.
REMAT: Mapping[str, Callable] = {
  "none": lambda layer: layer,  # keep everything
  "elementwise": partial(  # keep matrix products and attention
    jax.checkpoint,
    policy=_policies.save_from_both_policies(
      _policies.dots_with_no_batch_dims_saveable,
      _policies.save_only_these_names("attention"),
    ),
  ),
  "layer": jax.checkpoint,  # keep a layer's input only
}


class Decoder(nnx.Module):
  """A decoder-only transformer; its layers are stacked along axis L."""

  def __init__(
    self,
    config: model_config.ModelConfig,
    *,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Random weights.

    Args:
      config: the shape.
      dtype: what the layers compute in; the LM head is float32 at least.
      rngs: with a `params` stream.
    """
    self.config = config
    self.dtype = dtype
    self.embed = layers_lib.Embed(config.vocab_size, config.width, rngs=rngs)

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> layers_lib.DecoderLayer:
      return layers_lib.DecoderLayer(config, rngs=rngs)

    self.layers = stack(rngs)
    self.final_norm = layers_lib.RMSNorm(config.width, config.norm_eps)
    self.head = (
      None
      if config.tied_embeddings
      else layers_lib.Embed(config.vocab_size, config.width, rngs=rngs)
    )
    self.mtp = nnx.List(
      [
        layers_lib.MtpModule(config, rngs=rngs)
        for _ in range(config.mtp_modules)
      ]
    )

  def hidden(
    self,
    tokens: jnp.ndarray,
    position: jnp.ndarray,
    attend: layers_lib.Attend,
    *,
    remat: str = "none",
  ) -> jnp.ndarray:
    """Final hidden states, layers scanned.

    Args:
      tokens: int32 [...].
      position: int32 [...], rotary positions.
      attend: attention over q [..., H, C], k and v [..., K, C]; the same
        function serves every layer.
      remat: what the backward pass recomputes: a key of `REMAT`.

    Returns:
      [..., D] in the compute dtype, normed: ready for `logits`.
    """
    angles = rope.angles(self.config, position)
    graph, stacked = nnx.split(self.layers)

    def layer(x, params):
      return nnx.merge(graph, params)(x, angles, attend), None

    x, _ = jax.lax.scan(
      REMAT[remat](layer), self.embed(tokens, self.dtype), stacked
    )
    return self.final_norm(x)

  def logits(self, hidden: jnp.ndarray) -> jnp.ndarray:
    """Logits [..., V], in at least float32, of hidden states [..., D]."""
    return (self.embed if self.head is None else self.head).logits(hidden)

  @classmethod
  def from_params(
    cls,
    config: model_config.ModelConfig,
    params: Mapping[str, np.ndarray],
    *,
    dtype: jnp.dtype = jnp.float32,
  ) -> "Decoder":
    """A decoder with the given parameters (names as in the module's table).

    Raises:
      CheckpointError: a parameter is missing, unknown or wrongly shaped.
    """
    graph, state = nnx.split(abstract(config, dtype=dtype))
    flat = flatten(state)
    missing, unknown = flat.keys() - params.keys(), params.keys() - flat.keys()
    if missing or unknown:
      raise errors.CheckpointError(
        f"parameters do not fit the model: missing {sorted(missing)}, "
        f"unknown {sorted(unknown)}"
      )
    for name, value in flat.items():
      if value.shape != params[name].shape:
        raise errors.CheckpointError(
          f"parameter {name}: expected shape {value.shape}, "
          f"found {params[name].shape}"
        )
    return nnx.merge(graph, unflatten(state, params))


def abstract(
  config: model_config.ModelConfig, *, dtype: jnp.dtype = jnp.float32
) -> Decoder:
  """A decoder of shapes without values."""
  return nnx.eval_shape(
    lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(params=0))
  )


def flatten(state: nnx.State) -> dict[str, jax.Array]:
  """A state's arrays by their '/'-joined names."""
  return {
    "/".join(map(str, path)): leaf.get_value()
    for path, leaf in nnx.to_flat_state(state)
  }


def unflatten(
  state: nnx.State, params: Mapping[str, np.ndarray | jax.Array]
) -> nnx.State:
  """A state like `state` with the arrays of `params`, by name."""
  flat = nnx.to_flat_state(state)
  return nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(params["/".join(map(str, path))])))
      for path, leaf in flat
    ]
  )


class UnrolledDecoder(nnx.Module):
  """The same decoder with one module per layer, as an engine runs it.

  Unrolled, each layer's cache can be a buffer of its own, updated in place.
  Projections of one input are joined to one matrix, and products are taken as
  is fast for a few tokens (`layers.product`).
  """

  def __init__(self, decoder: Decoder, modules: int = 0, ways: int = 1):
    """Takes a decoder's weights, sliced by layer.

    Args:
      decoder: the weights.
      modules: how many of its modules that predict further tokens to take.
      ways: how many devices share each matrix.
    """
    graph, stacked = nnx.split(decoder.layers)
    self.config = decoder.config
    self.dtype = decoder.dtype
    self.embed = decoder.embed
    self.layers = nnx.List(
      [
        nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked))
        for i in range(decoder.config.num_layers)
      ]
    )
    self.final_norm = decoder.final_norm
    self.head = decoder.head
    self.mtp = nnx.List([nnx.clone(m) for m in list(decoder.mtp)[:modules]])
    for part in (*self.layers, *self.mtp):
      part.join(ways)

  def hidden(
    self,
    tokens: jnp.ndarray,
    position: jnp.ndarray,
    attends: Sequence[layers_lib.Attend],
  ) -> jnp.ndarray:
    """As `Decoder.hidden`, with one `attend` per layer."""
    angles = rope.angles(self.config, position)
    x = self.embed(tokens, self.dtype)
    for layer, attend in zip(self.layers, attends, strict=True):
      x = layer(x, angles, attend)
    return self.final_norm(x)

  def logits(self, hidden: jnp.ndarray) -> jnp.ndarray:
    """As `Decoder.logits`."""
    table = self.embed if self.head is None else self.head
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return layers_lib.product(
      hidden.astype(dtype), table.embedding[...].astype(dtype)
    )


def causal_attend(
  q: jnp.ndarray, k: jnp.ndarray, v: jnp.ndarray
) -> jnp.ndarray:
  """Dense causal attention over [B, T, heads, C]; the obvious reference."""
  batch, length, _, channels = q.shape
  kv_heads = k.shape[2]
  q = q.reshape(batch, length, kv_heads, -1, channels)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum(
    "btkgc,bskc->bkgts", q, k, preferred_element_type=wide
  ) * (channels**-0.5)
  visible = jnp.tril(jnp.ones((length, length), bool))
  scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  o = jnp.einsum("bkgts,bskc->btkgc", probs, v)
  return o.reshape(batch, length, -1, channels)


def causal_logits(decoder: Decoder, tokens_BT: jnp.ndarray) -> jnp.ndarray:
  """Logits [B, T, V] of plain sequences, for tests and references."""
  position = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape
  )
  return decoder.logits(decoder.hidden(tokens_BT, position, causal_attend))
