"""Weights on their way into the built-in engine: read, and refused if bad.

Whatever is wrong is found in the caller's thread, before the engine hears of
the new version; it goes on to serve the old one meanwhile.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from forge_jax import errors, types
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import params as params_lib
from forge_jax.model import published


def receive(
  weights: types.WeightsVersion,
  model: model_config.ModelConfig,
  dtype: jnp.dtype,
) -> nnx.State:
  """A version of the weights as a decoder's state.

  Args:
    weights: arrays, a decoder's state; or the path of a folder, as
      `model.published` writes it.
    model: the shape that they must have.
    dtype: of the engine's computations.

  Raises:
    EngineError: neither arrays nor a path, a folder that is damaged or of
      another version, another model's weights, or weights that are not finite.
  """
  refused = f"weights version {weights.version} are refused"
  try:
    if weights.path is not None:
      params = published.read(weights.path, model, weights.version)
      decoder = decoder_lib.Decoder.from_params(model, params, dtype=dtype)
      state = nnx.state(decoder)
    elif weights.params is not None:
      state = weights.params
      params_lib.check(model, decoder_lib.flatten(state))
    else:
      raise errors.EngineError(f"{refused}: neither arrays nor a path is given")
  except errors.CheckpointError as error:
    raise errors.EngineError(f"{refused}: {error}") from error
  flat = decoder_lib.flatten(state)
  finite = _finite(list(flat.values()))
  bad = [name for name, ok in zip(flat, finite.tolist(), strict=True) if not ok]
  if bad:
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise errors.EngineError(f"{refused}: {bad[0]}{more} holds NaN or infinity")
  return state


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
  """Whether each array is finite throughout; bool [len(arrays)]."""
  return jnp.stack([jnp.isfinite(array).all() for array in arrays])
