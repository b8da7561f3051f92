"""A decoder's parameters as a flat dict, and as the tensors of a file.

The names and shapes are those of the table in `decoder.py`. A file format
stores every layer's tensor by itself, and matrices output-major; `locate`
says which tensor of the file fills which part of which parameter.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from typing import Any

import numpy as np

from forge_jax import errors
from forge_jax.model import config as model_config

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_LAYER = "layers/"
_NAMED = 4  # tensors named in one error message


@dataclasses.dataclass(frozen=True, slots=True)
class FileTensor:
  """One tensor of a model file and the parameter that it fills."""

  tensor: str  # its name in the file
  shape: tuple[int, ...]  # as stored: a matrix is [outputs, inputs]
  param: str  # '/'-joined name of the parameter
  layer: int | None  # index along L; None: the parameter has no layers

  @property
  def transposed(self) -> bool:
    """Whether the parameter is the transpose of what the file stores."""
    return self.param.endswith("/kernel")

  def view(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """The part of the parameters that this tensor fills, as stored."""
    array = params[self.param]
    if self.layer is not None:
      array = array[self.layer]
    return array.T if self.transposed else array


def shapes(config: model_config.ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter of a decoder, by name."""
  c = config
  heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  table = {
    "embed/embedding": (c.vocab_size, c.width),
    "final_norm/scale": (c.width,),
  }
  if not c.tied_embeddings:
    table["head/embedding"] = (c.vocab_size, c.width)
  layer = {"attention_norm/scale": (c.width,), "mlp_norm/scale": (c.width,)}
  if c.qk_norm:
    layer["attention/query_norm/scale"] = (c.head_dim,)
    layer["attention/key_norm/scale"] = (c.head_dim,)
  for name, inputs, outputs, bias in (
    ("attention/query", c.width, heads, c.qkv_bias),
    ("attention/key", c.width, kv, c.qkv_bias),
    ("attention/value", c.width, kv, c.qkv_bias),
    ("attention/out", heads, c.width, c.out_bias),
    ("mlp/gate", c.width, c.mlp_width, c.mlp_bias),
    ("mlp/up", c.width, c.mlp_width, c.mlp_bias),
    ("mlp/down", c.mlp_width, c.width, c.mlp_bias),
  ):
    layer[f"{name}/kernel"] = (inputs, outputs)
    if bias:
      layer[f"{name}/bias"] = (outputs,)
  table |= {_LAYER + n: (c.num_layers, *shape) for n, shape in layer.items()}
  for module in range(c.mtp_modules):
    start = f"mtp/{module}/"
    for norm in ("embed_norm", "hidden_norm", "final_norm"):
      table[f"{start}{norm}/scale"] = (c.width,)
    table[f"{start}project/kernel"] = (2 * c.width, c.width)
    table |= {f"{start}layer/{name}": shape for name, shape in layer.items()}
  return table


def locate(
  config: model_config.ModelConfig, names: Mapping[str, str]
) -> list[FileTensor]:
  """The tensors of a file, in its order: layer by layer.

  Args:
    config: the decoder's shape.
    names: of the file's tensor, by a parameter's name without "/kernel",
      "/bias", "/scale" or "/embedding"; "{layer}" stands for the layer. The
      file's name ends in ".bias" for a bias and in ".weight" otherwise.
  """

  def tensor(param: str, shape: tuple[int, ...], layer: int | None):
    stem, kind = param.rsplit("/", 1)
    ending = "bias" if kind == "bias" else "weight"
    stored = shape[::-1] if kind == "kernel" else shape
    name = f"{names[stem].format(layer=layer)}.{ending}"
    return FileTensor(name, stored, param, layer)

  table = shapes(config)
  stacked = {n: s for n, s in table.items() if n.startswith(_LAYER)}
  single = {n: s for n, s in table.items() if n not in stacked}
  return [tensor(n, s, None) for n, s in single.items()] + [
    tensor(n, s[1:], layer)
    for layer in range(config.num_layers)
    for n, s in stacked.items()
  ]


def read(
  config: model_config.ModelConfig,
  tensors: Collection[FileTensor],
  found: Collection[str],
  load: Callable[[str], np.ndarray],
  where: str,
) -> dict[str, np.ndarray]:
  """Fills a decoder's parameters from a file, one tensor at a time.

  Args:
    config: the decoder's shape.
    tensors: what the file must hold, from `locate`.
    found: names of what it does hold.
    load: reads a tensor by its name in the file; peak memory is that of the
      parameters plus one tensor.
    where: the file, for messages.

  Returns:
    float32 arrays, by the names of `shapes`.

  Raises:
    CheckpointError: a tensor is missing, unexpected, wrongly shaped or not
      of floating point.
  """
  expected = {t.tensor: t for t in tensors}
  missing = [
    f"{name} of shape {list(expected[name].shape)}"
    for name in expected
    if name not in found
  ]
  if missing:
    raise errors.CheckpointError(f"{where}: {_listed('missing', missing)}")
  unexpected = sorted(set(found) - expected.keys())
  if unexpected:
    raise errors.CheckpointError(
      f"{where}: {_listed('unexpected', unexpected)}"
    )
  params = {n: np.empty(s, np.float32) for n, s in shapes(config).items()}
  for name, tensor in expected.items():
    value = load(name)
    if value.shape != tensor.shape:
      raise errors.CheckpointError(
        f"{where}: tensor {name}: expected shape {list(tensor.shape)}, "
        f"found {list(value.shape)}"
      )
    if value.dtype.name not in _FLOATS:
      raise errors.CheckpointError(
        f"{where}: tensor {name}: expected one of {sorted(_FLOATS)}, found "
        f"{value.dtype.name}"
      )
    tensor.view(params)[...] = value
  return params


def check(
  config: model_config.ModelConfig, params: Mapping[str, np.ndarray]
) -> None:
  """Checks the names and shapes of a decoder's parameters.

  Raises:
    CheckpointError: a parameter is missing, unknown or wrongly shaped.
  """
  table = shapes(config)
  missing, unknown = table.keys() - params.keys(), params.keys() - table.keys()
  if missing or unknown:
    raise errors.CheckpointError(
      f"parameters do not fit the model: missing {sorted(missing)}, "
      f"unknown {sorted(unknown)}"
    )
  for name, shape in table.items():
    if params[name].shape != shape:
      raise errors.CheckpointError(
        f"parameter {name}: expected shape {shape}, found {params[name].shape}"
      )


def check_finite(params: Mapping[str, np.ndarray]) -> None:
  """Checks that a decoder's parameters are numbers.

  Raises:
    CheckpointError: a parameter holds NaN or infinity.
  """
  for name, array in params.items():
    if not np.isfinite(array).all():
      raise errors.CheckpointError(f"parameter {name}: holds NaN or infinity")


def decoder_config(where: str, **shape: Any) -> model_config.ModelConfig:
  """A decoder's shape as a file states it.

  Raises:
    CheckpointError: no decoder has such a shape; the message names the file.
  """
  try:
    return model_config.ModelConfig(**shape)
  except errors.ConfigError as error:
    raise errors.CheckpointError(f"{where}: {error}") from error


def _listed(what: str, names: list[str]) -> str:
  more = len(names) - _NAMED
  tail = f" and {more} more" if more > 0 else ""
  plural = "s" if len(names) > 1 else ""
  return (
    f"{len(names)} {what} tensor{plural}: {', '.join(names[:_NAMED])}{tail}"
  )
