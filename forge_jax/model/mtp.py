"""Multi-token prediction: small modules that draft tokens ahead of the trunk.

DeepSeek-V3 (arXiv 2412.19437, section 2.2), which MiniMax-M2 follows. Module
n = 1..N has one decoder layer; the embedding and the LM head are the trunk's:

  x_j = project([norm(embed(token_j)), norm(h_parent(j))])
  h'_j = norm(layer(x)_j)          -> head -> the distribution of token j + 1

where h is what the module before it returned, and for the first the trunk's
final hidden states. So h' of module n predicts the very token that the trunk
predicts at j, but has last seen the trunk n tokens earlier: an engine drafts
with it before the trunk has run.

Token j's predecessor is its parent, so that modules run on prefix trees as they
are, with the trunk's attention. A token without a parent has h = 0; where fewer
than n tokens precede j, module n knows nothing.

`detached` makes a loss on drafts train the modules alone.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from forge_jax import errors
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import layers as layers_lib
from forge_jax.model import rope

INITS = ("copy", "fresh")


def hidden(
  decoder: decoder_lib.Decoder,
  trunk: jnp.ndarray,
  tokens: jnp.ndarray,
  parent: jnp.ndarray,
  position: jnp.ndarray,
  attend: layers_lib.Attend,
) -> list[jnp.ndarray]:
  """Hidden states of every module, ready for the LM head.

  Args:
    decoder: with `mtp_modules` of at least 1.
    trunk: what `Decoder.hidden` returned, [B, T, D].
    tokens: int32 [B, T].
    parent: int32 [B, T], index of each token's predecessor; -1: none.
    position: int32 [B, T], rotary positions: depths.
    attend: as for `Decoder.hidden`.

  Returns:
    One [B, T, D] a module, in the compute dtype.
  """
  angles = rope.angles(decoder.config, position)
  embedded = decoder.embed(tokens, decoder.dtype)
  first = (parent < 0)[..., None]
  state, states = trunk, []
  for module in decoder.mtp:
    before = jnp.take_along_axis(
      state, jnp.maximum(parent, 0)[..., None], axis=1
    )
    before = jnp.where(first, jnp.zeros((), before.dtype), before)
    state = module(embedded, before, angles, attend)
    states.append(state)
  return states


def of_module(path: tuple[Any, ...]) -> bool:
  """Whether a leaf of a decoder's state, by its key path, is a module's."""
  return getattr(path[0], "key", None) == "mtp"


def detached(state: nnx.State) -> nnx.State:
  """A decoder's state whose trunk takes no gradient, but whose modules do."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x if of_module(path) else lax.stop_gradient(x), state
  )


def grow(
  decoder: decoder_lib.Decoder,
  modules: int,
  *,
  init: str = "copy",
  rngs: nnx.Rngs,
) -> decoder_lib.Decoder:
  """A decoder with the same trunk and new modules.

  Args:
    decoder: its modules, if any, are dropped.
    modules: how many, at least 1.
    init: "copy" gives each module the trunk's last layer and final norm (as
      MiniMax-M2 begins its further modules), and passes the state on with
      the token's vector added; "fresh" draws everything.
    rngs: with a `params` stream.

  Raises:
    ConfigError: an unknown `init`.
  """
  if init not in INITS:
    raise errors.ConfigError(
      f"model.mtp_init={init!r}; expected one of {', '.join(INITS)}"
    )
  config = dataclasses.replace(decoder.config, mtp_modules=modules)
  params = decoder_lib.flatten(nnx.state(decoder))
  params = {n: x for n, x in params.items() if not n.startswith("mtp/")}
  for number in range(modules):
    fresh = layers_lib.MtpModule(config, rngs=rngs)
    start = f"mtp/{number}/"
    new = decoder_lib.flatten(nnx.state(fresh))
    if init == "copy":
      for name, value in params.items():
        if name.startswith("layers/"):
          new["layer/" + name.removeprefix("layers/")] = value[-1]
      # A copy: buffers are donated, each once.
      new["final_norm/scale"] = jnp.array(params["final_norm/scale"])
      # Half of the projection reads the token, half the state.
      eye = jnp.eye(config.width)
      new["project/kernel"] = jnp.concatenate([eye, eye])
    params |= {start + name: value for name, value in new.items()}
  return decoder_lib.Decoder.from_params(config, params, dtype=decoder.dtype)
