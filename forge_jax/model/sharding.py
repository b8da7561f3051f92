"""Where parameters and batches live on the device mesh.

The mesh has one axis for each way to split the work; all have size 1 on a
laptop. Parameters are placed by regular expressions on their '/'-joined names:
the first rule that matches wins.
"""

from collections.abc import Sequence
import dataclasses
import math
import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from forge_jax import errors
from forge_jax.model import config as model_config

AXES = ("data", "fsdp", "tensor", "context", "expert")
BATCH_AXES = ("data", "fsdp")  # packs of a batch are split over these

RULES = (
  (r"^(embed|head)/embedding$", P("tensor", "fsdp")),
  (r"^layers/attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
  (r"^layers/attention/(query|key|value)/bias$", P(None, "tensor")),
  (r"^layers/attention/out/kernel$", P(None, "tensor", "fsdp")),
  (r"^layers/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
  (r"^layers/mlp/(gate|up)/bias$", P(None, "tensor")),
  (r"^layers/mlp/down/kernel$", P(None, "tensor", "fsdp")),
  # Those of an engine, output-major.
  (r"^layers/(attention|mlp)/joined/matrix$", P(None, "tensor", "fsdp")),
  (r"^layers/(attention|mlp)/joined/bias$", P(None, "tensor")),
  (r"^layers/(attention/out|mlp/down)/matrix$", P(None, "fsdp", "tensor")),
  (r"^mtp/\d+/project/kernel$", P("fsdp")),
  (r"", P()),  # norms and output biases are replicated
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; their product is the number of devices."""

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh of all devices, or of the ones given.

  Raises:
    ConfigError: the axes' product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(getattr(config, axis) for axis in AXES)
  if int(np.prod(shape)) != len(devices):
    sizes = ", ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
    raise errors.ConfigError(
      f"the mesh {sizes} needs {int(np.prod(shape))} devices; there are "
      f"{len(devices)}"
    )
  return Mesh(np.asarray(devices).reshape(shape), AXES)


def check_divisible(model: model_config.ModelConfig, mesh: Mesh) -> None:
  """Checks that the model can be split over the mesh.

  Raises:
    ConfigError: naming the dimension, the axis that does not divide it, and
      what would.
  """
  split = {
    "tensor": ("vocab_size", "num_heads", "num_kv_heads", "mlp_width"),
    "fsdp": ("width",),
  }
  for axis, names in split.items():
    most = math.gcd(*(getattr(model, name) for name in names))
    for name in names:
      size = getattr(model, name)
      if size % mesh.shape[axis]:
        raise errors.ConfigError(
          f"mesh axis {axis}={mesh.shape[axis]} does not divide the model's "
          f"{name}={size}; expected a divisor of {most}, which divides "
          f"{', '.join(names)}"
        )


def spec_of(name: str) -> P:
  """The placement of the parameter of a '/'-joined name."""
  stacked = re.sub(r"^(mtp/\d+/layer|layers/\d+)/", "layers/", name)
  spec = next(spec for rule, spec in RULES if re.search(rule, stacked))
  return spec if stacked == name else P(*spec[1:])  # without the axis L


def place(tree, mesh: Mesh):
  """Puts a pytree that contains parameter states onto the mesh.

  Optimizer states mirror the parameters' structure, so a leaf's placement is
  found by the end of its path; leaves of other shapes are replicated.
  """
  return jax.tree.map(jax.device_put, tree, placements(tree, mesh))


def placements(tree, mesh: Mesh):
  """The `NamedSharding` of every leaf of a pytree of parameter states."""

  def placement(path, leaf):
    name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
    name = re.sub(r"/(value|0)$", "", name)
    start = re.search(r"(mtp|embed|head|layers|final_norm)/", name)
    spec = spec_of(name[start.start() :]) if start else P()
    return NamedSharding(mesh, spec if len(spec) <= leaf.ndim else P())

  return jax.tree_util.tree_map_with_path(placement, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Arrays with a leading axis of packs."""
  return NamedSharding(mesh, P(BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
  """In how many ways a batch's packs are split."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
