"""Reads a decoder from a GGUF file, dequantised to float32.

The format is that of llama.cpp (ggml/docs/gguf.md), read by its `gguf`
package. Three architectures are known: llama, qwen2 and qwen3. In a llama
file the rows of the query and key matrices are stored for a rotation of
neighbouring channels; they are put back in the order of rotated halves.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
from typing import Any

import gguf
import numpy as np

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import params as params_lib
from forge_jax.model import rope

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FREQS = "rope_freqs.weight"
_NAMES = {
  "embed": "token_embd",
  "final_norm": "output_norm",
  "head": "output",
  "layers/attention_norm": "blk.{layer}.attn_norm",
  "layers/attention/query": "blk.{layer}.attn_q",
  "layers/attention/key": "blk.{layer}.attn_k",
  "layers/attention/value": "blk.{layer}.attn_v",
  "layers/attention/out": "blk.{layer}.attn_output",
  "layers/attention/query_norm": "blk.{layer}.attn_q_norm",
  "layers/attention/key_norm": "blk.{layer}.attn_k_norm",
  "layers/mlp_norm": "blk.{layer}.ffn_norm",
  "layers/mlp/gate": "blk.{layer}.ffn_gate",
  "layers/mlp/up": "blk.{layer}.ffn_up",
  "layers/mlp/down": "blk.{layer}.ffn_down",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Metadata:
  """A file's metadata, with the architecture's own keys by short name."""

  path: pathlib.Path
  architecture: str
  values: Mapping[str, Any]

  def number(self, key: str, default: float | None = None) -> float:
    """A number; without a default the key must be there."""
    full = f"{self.architecture}.{key}"
    value = self.values.get(full, default)
    if value is None:
      raise errors.CheckpointError(f"{self.path}: metadata {full!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise errors.CheckpointError(
        f"{self.path}: metadata {full!r} is {value!r}, expected a number"
      )
    return value

  def integer(
    self, key: str, default: int | None = None, minimum: int = 1
  ) -> int:
    """A whole number of at least `minimum`, otherwise as `number`."""
    value = self.number(key, default)
    if value != int(value) or value < minimum:
      raise errors.CheckpointError(
        f"{self.path}: metadata '{self.architecture}.{key}' is {value!r}, "
        f"expected a whole number of at least {minimum}"
      )
    return int(value)


def read_gguf(
  path: str | os.PathLike[str],
) -> tuple[model_config.ModelConfig, dict[str, np.ndarray]]:
  """Reads a decoder's shape and its parameters.

  Args:
    path: a GGUF file of the llama, qwen2 or qwen3 architecture, of any
      tensor types that the `gguf` package can dequantise.

  Returns:
    The shape, and float32 parameters by the names in `decoder.py`.

  Raises:
    CheckpointError: there is no such file, it is not GGUF, its architecture
      is not known, a metadata key is missing, or a tensor is missing,
      unexpected or wrongly shaped; the message names it.
  """
  path = pathlib.Path(path)
  reader = _open(path)
  tensors = {t.name: t for t in reader.tensors}
  fields = _metadata(path, reader)
  config = _config(fields, tensors)
  if _ROPE_FREQS in tensors:
    factors = _load(path, tensors.pop(_ROPE_FREQS))
    config = _with_rope_factors(path, config, factors)
  params = params_lib.read(
    config,
    params_lib.locate(config, _NAMES),
    tensors,
    lambda name: _load(path, tensors[name]),
    str(path),
  )
  if fields.architecture == "llama":
    for name in ("query/kernel", "key/kernel", "query/bias", "key/bias"):
      stacked = params.get(f"layers/attention/{name}")
      if stacked is not None:
        _halve_rotations(stacked, config.head_dim)
  return config, params


def _open(path: pathlib.Path) -> gguf.GGUFReader:
  try:
    return gguf.GGUFReader(path)
  except OSError as error:
    raise errors.CheckpointError(
      f"{path}: cannot be read: {error.strerror}"
    ) from error
  except (ValueError, IndexError, KeyError, OverflowError) as error:
    raise errors.CheckpointError(
      f"{path}: not a GGUF file, or cut short: {error}"
    ) from error


def _metadata(path: pathlib.Path, reader: gguf.GGUFReader) -> _Metadata:
  key = "general.architecture"
  if key not in reader.fields:
    raise errors.CheckpointError(f"{path}: metadata {key!r} is missing")
  architecture = reader.fields[key].contents()
  if architecture not in _ARCHITECTURES:
    raise errors.CheckpointError(
      f"{path}: architecture {architecture!r} is unknown; expected one of "
      f"{', '.join(_ARCHITECTURES)}"
    )
  values = {
    name: field.contents()
    for name, field in reader.fields.items()
    if name.startswith(f"{architecture}.")
  }
  return _Metadata(path, architecture, values)


def _config(
  fields: _Metadata, tensors: Mapping[str, gguf.ReaderTensor]
) -> model_config.ModelConfig:
  path = fields.path
  embedding = tensors.get("token_embd.weight")
  if embedding is None:
    raise errors.CheckpointError(f"{path}: 1 missing tensor: token_embd.weight")
  width = fields.integer("embedding_length")
  heads = fields.integer("attention.head_count")
  channels = fields.integer("attention.key_length", width // heads)
  for key in ("attention.value_length", "rope.dimension_count"):
    if fields.integer(key, channels) != channels:
      raise errors.CheckpointError(
        f"{path}: {key} is {fields.integer(key)}; only the head's "
        f"{channels} channels, all of them, can be read"
      )
  experts = fields.integer("expert_count", 0, minimum=0)
  if experts:
    raise errors.CheckpointError(
      f"{path}: expert_count is {experts}; a mixture of experts cannot be read"
    )
  return params_lib.decoder_config(
    str(path),
    vocab_size=int(embedding.shape[-1]),
    width=width,
    num_layers=fields.integer("block_count"),
    num_heads=heads,
    num_kv_heads=fields.integer("attention.head_count_kv", heads),
    head_dim=channels,
    mlp_width=fields.integer("feed_forward_length"),
    max_context=fields.integer("context_length"),
    rope_theta=fields.number("rope.freq_base", 10_000.0),
    rope_scaling=_rope_scaling(fields),
    norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
    tied_embeddings="output.weight" not in tensors,
    qkv_bias="blk.0.attn_q.bias" in tensors,
    out_bias="blk.0.attn_output.bias" in tensors,
    mlp_bias="blk.0.ffn_gate.bias" in tensors,
    qk_norm=fields.architecture == "qwen3",
  )


def _rope_scaling(fields: _Metadata) -> model_config.RopeScaling | None:
  key = f"{fields.architecture}.rope.scaling.type"
  kind = fields.values.get(key, "none")
  if kind == "none":
    return None
  if kind not in ("linear", "yarn"):
    raise errors.CheckpointError(
      f"{fields.path}: {key} is {kind!r}; expected one of none, linear, yarn"
    )
  factor = fields.number("rope.scaling.factor")
  context = fields.integer(
    "rope.scaling.original_context_length", fields.integer("context_length")
  )
  if kind == "linear":
    return model_config.RopeScaling(kind, factor, context)
  # llama.cpp scales cosines and sines by this times 0.1 ln(factor) + 1.
  attention = fields.number("rope.scaling.attn_factor", 1.0)
  return model_config.RopeScaling(
    kind,
    factor,
    context,
    beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
    beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
    attention_factor=(
      None if attention == 1.0 else attention * (0.1 * math.log(factor) + 1.0)
    ),
  )


def _with_rope_factors(
  path: pathlib.Path, config: model_config.ModelConfig, factors: np.ndarray
) -> model_config.ModelConfig:
  """The config whose rotary frequencies are divided by stored factors.

  A Llama 3.1 file keeps, instead of the scaling's parameters, the factor of
  every frequency. They are recognised by computing them from the published
  parameters (low 1, high 4, context 8192) and the largest factor.
  """
  if config.rope_scaling is None:
    if np.all(factors == 1.0):
      return config
    scaled = dataclasses.replace(
      config,
      rope_scaling=model_config.RopeScaling(
        "llama3", float(factors.max()), 8192, 1.0, 4.0
      ),
    )
    expected = rope.frequencies(config)[0] / rope.frequencies(scaled)[0]
    if factors.shape == expected.shape and np.allclose(
      factors, expected, rtol=1e-4
    ):
      return scaled
  raise errors.CheckpointError(
    f"{path}: tensor {_ROPE_FREQS} of shape {list(factors.shape)} (from "
    f"{factors.min():g} to {factors.max():g}) is not the published scaling "
    "of Llama 3.1"
  )


def _load(path: pathlib.Path, tensor: gguf.ReaderTensor) -> np.ndarray:
  """A tensor as float32, its last axis contiguous in the file."""
  try:
    return gguf.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise errors.CheckpointError(
      f"{path}: tensor {tensor.name}: its type "
      f"{tensor.tensor_type.name} cannot be dequantised"
    ) from error


def _halve_rotations(stacked: np.ndarray, head_dim: int) -> None:
  """Reorders, in place, each head's channels of the last axis of [L, ...]:
  from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...).
  """
  for layer in stacked:
    pairs = layer.reshape(*layer.shape[:-1], -1, head_dim // 2, 2)
    layer[...] = pairs.swapaxes(-1, -2).reshape(layer.shape)
