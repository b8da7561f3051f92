"""Reads and writes a decoder as a Hugging Face folder.

A folder holds `config.json` (see `huggingface_config.py`) and either
`model.safetensors` or, in shards, `model.safetensors.index.json` and the
files that it names. A folder is written beside its final place and renamed,
so that it is there completely or not at all.
"""

from collections.abc import Mapping, Sequence
import contextlib
import os
import pathlib
import secrets
import shutil
import stat

import numpy as np
import safetensors
import safetensors.numpy

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import disk, huggingface_config
from forge_jax.model import params as params_lib

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 1 << 30
_NAMES = {
  "embed": "model.embed_tokens",
  "final_norm": "model.norm",
  "head": "lm_head",
  "layers/attention_norm": "model.layers.{layer}.input_layernorm",
  "layers/attention/query": "model.layers.{layer}.self_attn.q_proj",
  "layers/attention/key": "model.layers.{layer}.self_attn.k_proj",
  "layers/attention/value": "model.layers.{layer}.self_attn.v_proj",
  "layers/attention/out": "model.layers.{layer}.self_attn.o_proj",
  "layers/attention/query_norm": "model.layers.{layer}.self_attn.q_norm",
  "layers/attention/key_norm": "model.layers.{layer}.self_attn.k_norm",
  "layers/mlp_norm": "model.layers.{layer}.post_attention_layernorm",
  "layers/mlp/gate": "model.layers.{layer}.mlp.gate_proj",
  "layers/mlp/up": "model.layers.{layer}.mlp.up_proj",
  "layers/mlp/down": "model.layers.{layer}.mlp.down_proj",
}


def read_huggingface(
  folder: str | os.PathLike[str],
) -> tuple[model_config.ModelConfig, dict[str, np.ndarray]]:
  """Reads a decoder's shape and its parameters.

  Args:
    folder: with `config.json` of a llama, mistral, qwen2 or qwen3 model and
      its safetensors.

  Returns:
    The shape, and float32 parameters by the names in `decoder.py`.

  Raises:
    CheckpointError: a file or a key is missing or cannot be read, the model
      is of another family, or a tensor is missing, unexpected or wrongly
      shaped; the message names it.
  """
  folder = pathlib.Path(folder)
  config = huggingface_config.from_json(
    disk.read_json(folder / _CONFIG), str(folder / _CONFIG)
  )
  with contextlib.ExitStack() as stack:
    files = _open_tensors(folder, stack)
    found = {name for name in files if not _derived(name, config)}

    def load(name: str) -> np.ndarray:
      try:
        return files[name].get_tensor(name)
      except (safetensors.SafetensorError, TypeError) as error:
        raise errors.CheckpointError(
          f"{folder}: tensor {name} cannot be read: {error}"
        ) from error

    params = params_lib.read(
      config, file_tensors(config), found, load, str(folder)
    )
  return config, params


def write_huggingface(
  folder: str | os.PathLike[str],
  config: model_config.ModelConfig,
  params: Mapping[str, np.ndarray],
  *,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes a decoder as a new folder, completely or not at all.

  Args:
    folder: where to; it must not exist yet, its parent is made.
    config: the decoder's shape.
    params: arrays by the names in `decoder.py`, kept in their dtype.
    shard_bytes: the most bytes of tensors in a file, unless one tensor alone
      is larger; about as much extra memory is used.

  Raises:
    CheckpointError: the folder exists, no family of models has this shape,
      a parameter is missing, unknown or wrongly shaped, or the disk is full
      or cannot be written to.
  """
  folder = pathlib.Path(folder)
  params_lib.check(config, params)
  dtype = str(params["embed/embedding"].dtype)
  described = huggingface_config.to_json(config, dtype)
  shards = _plan(file_tensors(config), params, shard_bytes)
  if folder.exists():
    raise errors.CheckpointError(f"{folder}: exists already; not overwritten")
  partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
  try:
    partial.mkdir(parents=True)
    disk.write_json(partial / _CONFIG, described)
    _write_shards(partial, shards, params)
    disk.flush(partial)
    partial.rename(folder)
    disk.flush(folder.parent)
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.CheckpointError(
      f"{folder}: cannot be written: {error}"
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def file_tensors(
  config: model_config.ModelConfig,
) -> list[params_lib.FileTensor]:
  """The tensors of a decoder's safetensors, in their order."""
  return params_lib.locate(config, _NAMES | _mtp_names(config))


def _mtp_names(config: model_config.ModelConfig) -> dict[str, str]:
  """Modules' tensors: layers behind the last, named as in DeepSeek-V3's files.

  A file's `eh_proj` reads the token's half first, as `project` does.
  """
  names = {}
  for module in range(config.mtp_modules):
    layer = config.num_layers + module
    start, stem = f"mtp/{module}/", f"model.layers.{layer}."
    names |= {
      f"{start}embed_norm": f"{stem}enorm",
      f"{start}hidden_norm": f"{stem}hnorm",
      f"{start}project": f"{stem}eh_proj",
      f"{start}final_norm": f"{stem}shared_head.norm",
    } | {
      f"{start}layer/{name.removeprefix('layers/')}": file.format(layer=layer)
      for name, file in _NAMES.items()
      if name.startswith("layers/")
    }
  return names


def _open_tensors(
  folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, safetensors.safe_open]:
  """The open file that holds each tensor, by the tensor's name."""
  index = folder / _INDEX
  if not index.exists():
    handle = _open(folder / _SINGLE, stack)
    return dict.fromkeys(handle.keys(), handle)
  weight_map = disk.read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(
    isinstance(name, str) for name in weight_map.values()
  ):
    raise errors.CheckpointError(
      f"{index}: 'weight_map' is missing or does not name files"
    )
  handles = {
    name: _open(folder / name, stack)
    for name in sorted(set(weight_map.values()))
  }
  held = {name: set(handle.keys()) for name, handle in handles.items()}
  for tensor, name in weight_map.items():
    if tensor not in held[name]:
      raise errors.CheckpointError(
        f"{folder / name}: missing tensor {tensor}, which {_INDEX} places here"
      )
  return {tensor: handles[name] for tensor, name in weight_map.items()}


def _open(
  path: pathlib.Path, stack: contextlib.ExitStack
) -> safetensors.safe_open:
  if not path.is_file():
    raise errors.CheckpointError(f"{path}: no such file")
  try:
    return stack.enter_context(safetensors.safe_open(path, framework="np"))
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.CheckpointError(
      f"{path}: not a safetensors file, or cut short: {error}"
    ) from error


def _derived(name: str, config: model_config.ModelConfig) -> bool:
  """Whether a tensor only repeats what the rest of the model states."""
  tied_head = config.tied_embeddings and name == "lm_head.weight"
  return tied_head or name.endswith(".rotary_emb.inv_freq")


def _plan(
  tensors: Sequence[params_lib.FileTensor],
  params: Mapping[str, np.ndarray],
  shard_bytes: int,
) -> list[list[params_lib.FileTensor]]:
  """Cuts the tensors, in order, into files of at most `shard_bytes`."""
  shards, size = [[]], 0
  for tensor in tensors:
    itemsize = params[tensor.param].dtype.itemsize
    nbytes = int(np.prod(tensor.shape)) * itemsize
    if shards[-1] and size + nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += nbytes
  return shards


def _write_shards(
  folder: pathlib.Path,
  shards: Sequence[Sequence[params_lib.FileTensor]],
  params: Mapping[str, np.ndarray],
) -> None:
  weight_map, total = {}, 0
  for i, shard in enumerate(shards, start=1):
    name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    path = folder / (_SINGLE if len(shards) == 1 else name)
    arrays = {t.tensor: np.ascontiguousarray(t.view(params)) for t in shard}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    # The library makes files that only their owner can read.
    path.chmod(stat.S_IMODE((folder / _CONFIG).stat().st_mode))
    disk.flush(path)
    weight_map |= dict.fromkeys(arrays, name)
    total += sum(array.nbytes for array in arrays.values())
  if len(shards) > 1:
    disk.write_json(
      folder / _INDEX,
      {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
