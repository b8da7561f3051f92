"""Rotary positions (Su et al., 2021, arXiv 2104.09864), halves rotated.

The frequencies are computed once on the host; position p turns channel pair i
by p * frequency[i].
"""

import math

import jax.numpy as jnp
import numpy as np

from forge_jax.model import config as model_config


def frequencies(config: model_config.ModelConfig) -> tuple[np.ndarray, float]:
  """The rotary frequencies and the factor on cosines and sines.

  Returns:
    float32 [C/2] radians per position, and the attention factor (1 but for
    yarn).
  """
  exponent = np.arange(0, config.head_dim, 2) / config.head_dim
  base = config.rope_theta**-exponent
  scaling = config.rope_scaling
  if scaling is None:
    return base.astype(np.float32), 1.0
  if scaling.kind == "linear":
    return (base / scaling.factor).astype(np.float32), 1.0
  if scaling.kind == "llama3":
    return _llama3(base, scaling).astype(np.float32), 1.0
  factor = scaling.attention_factor
  if factor is None:
    factor = 0.1 * math.log(scaling.factor) + 1.0
  return _yarn(base, config, scaling).astype(np.float32), factor


def _llama3(base: np.ndarray, s: model_config.RopeScaling) -> np.ndarray:
  """Blends by how many wavelengths fit in the original context."""
  turns = s.original_context * base / (2 * math.pi)
  blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  blend = np.clip(blend, 0.0, 1.0)
  return (1 - blend) * base / s.factor + blend * base


def _yarn(
  base: np.ndarray,
  config: model_config.ModelConfig,
  s: model_config.RopeScaling,
) -> np.ndarray:
  """Interpolates slow channels, keeps fast ones (YaRN, section 3.2)."""

  def channel(turns: float) -> float:
    """The (fractional) channel that makes `turns` turns in the context."""
    return (
      config.head_dim
      * math.log(s.original_context / (turns * 2 * math.pi))
      / (2 * math.log(config.rope_theta))
    )

  low = max(math.floor(channel(s.beta_fast)), 0)
  high = min(math.ceil(channel(s.beta_slow)), config.head_dim - 1)
  ramp = (np.arange(len(base)) - low) / max(high - low, 1e-3)
  keep = 1.0 - np.clip(ramp, 0.0, 1.0)
  return base / s.factor * (1 - keep) + base * keep


def angles(
  config: model_config.ModelConfig, position: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """Cosines and sines, float32 [..., 1, C/2], of integer positions [...]."""
  frequency, factor = frequencies(config)
  turn = position[..., None, None].astype(jnp.float32) * jnp.asarray(
    frequency
  ).reshape((1,) * (position.ndim + 1) + (-1,))
  return jnp.cos(turn) * factor, jnp.sin(turn) * factor


def rotate(
  x: jnp.ndarray, cosine: jnp.ndarray, sine: jnp.ndarray
) -> jnp.ndarray:
  """Rotates the heads [..., heads, C] by angles [..., 1, C/2]; keeps dtype."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  first, second = jnp.split(x.astype(wide), 2, axis=-1)
  return jnp.concatenate(
    [first * cosine - second * sine, second * cosine + first * sine], axis=-1
  ).astype(x.dtype)
