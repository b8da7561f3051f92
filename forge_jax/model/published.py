"""A published version of a model's weights: a folder with a manifest.

The folder is one in the Hugging Face format (see `huggingface.py`), so that
any engine can read it, with a `manifest.json` beside:

  format    "forge-weights/1"
  version   number of trainer steps behind the weights
  model     the decoder's shape, the fields of `ModelConfig`
  tensors   by name: dtype and shape, as stored
  files     by name: size in bytes and SHA-256

Invariants:
  - A folder appears under its final name complete and synced, or not at all.
  - Weights that are not finite are neither written nor read.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import secrets
import shutil
from typing import Any

import numpy as np

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import disk, huggingface
from forge_jax.model import params as params_lib

MANIFEST = "manifest.json"
FORMAT = "forge-weights/1"
_CLOSE = 1e-6  # a GGUF file keeps float32 of what a config.json spells out


def write(
  folder: str | os.PathLike[str],
  config: model_config.ModelConfig,
  params: Mapping[str, np.ndarray],
  version: int,
) -> None:
  """Writes a version as a new folder, completely or not at all.

  Args:
    folder: where to; it must not exist yet, its parent is made.
    config: the decoder's shape.
    params: finite arrays by the names in `decoder.py`, kept in their dtype.
    version: number of trainer steps behind them.

  Raises:
    CheckpointError: a parameter is missing, wrongly shaped or not finite, the
      folder exists, or the disk is full or cannot be written to.
  """
  folder = pathlib.Path(folder)
  params_lib.check_finite(params)
  if folder.exists():
    raise errors.CheckpointError(f"{folder}: exists already; not overwritten")
  staged = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.staged")
  try:
    huggingface.write_huggingface(staged, config, params)
    manifest = {
      "format": FORMAT,
      "version": version,
      "model": dataclasses.asdict(config),
      "tensors": {
        tensor.tensor: {
          "dtype": str(params[tensor.param].dtype),
          "shape": list(tensor.shape),
        }
        for tensor in huggingface.file_tensors(config)
      },
      "files": {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(staged.iterdir())
      },
    }
    disk.write_json(staged / MANIFEST, manifest)
    disk.flush(staged)
    staged.rename(folder)
    disk.flush(folder.parent)
  except OSError as error:
    raise errors.CheckpointError(
      f"{folder}: cannot be written: {error}"
    ) from error
  finally:
    shutil.rmtree(staged, ignore_errors=True)


def version(folder: str | os.PathLike[str]) -> int:
  """The version that a folder holds, by its manifest.

  Raises:
    CheckpointError: there is no manifest, or it is malformed.
  """
  return _read_manifest(pathlib.Path(folder))["version"]


def read(
  folder: str | os.PathLike[str],
  config: model_config.ModelConfig,
  version: int,
) -> dict[str, np.ndarray]:
  """Reads a version, after checking that it is whole and the one meant.

  Args:
    folder: as `write` makes it.
    config: the decoder's shape that the weights must have.
    version: the version that they must be.

  Returns:
    float32 parameters by the names in `decoder.py`.

  Raises:
    CheckpointError: the folder is incomplete, damaged, of another version or
      of another model; the message names the file, tensor or field.
  """
  folder = pathlib.Path(folder)
  _check_model(folder, _read_manifest(folder), config)
  verify(folder, version)
  _, params = huggingface.read_huggingface(folder)
  return params


def verify(folder: str | os.PathLike[str], version: int) -> None:
  """Checks that a folder is whole and holds a version.

  Raises:
    CheckpointError: it is incomplete, damaged or of another version; the
      message names the file.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder)
  if manifest["version"] != version:
    raise errors.CheckpointError(
      f"{folder}: holds version {manifest['version']}, expected {version}"
    )
  for name, about in manifest["files"].items():
    _check_file(folder / name, about)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / MANIFEST
  if not path.is_file():
    raise errors.CheckpointError(
      f"{folder}: there is no {MANIFEST}: no published weights, or half-written"
    )
  manifest = disk.read_json(path)
  if manifest.get("format") != FORMAT:
    raise errors.CheckpointError(
      f"{path}: format {manifest.get('format')!r}, expected {FORMAT!r}"
    )
  kinds = {"version": int, "model": dict, "tensors": dict, "files": dict}
  for key, kind in kinds.items():
    if not isinstance(manifest.get(key), kind):
      raise errors.CheckpointError(
        f"{path}: {key!r} is missing or no {kind.__name__}"
      )
  return manifest


def _check_model(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  config: model_config.ModelConfig,
) -> None:
  expected = json.loads(json.dumps(dataclasses.asdict(config)))
  found = manifest["model"]
  for field in sorted(expected.keys() | found.keys()):
    if not _same(expected.get(field), found.get(field)):
      raise errors.CheckpointError(
        f"{folder}: another model's weights: {field}={found.get(field)!r}, "
        f"the engine's model has {expected.get(field)!r}"
      )
  for tensor in huggingface.file_tensors(config):
    about = manifest["tensors"].get(tensor.tensor)
    if not isinstance(about, dict) or about.get("shape") != list(tensor.shape):
      raise errors.CheckpointError(
        f"{folder}: tensor {tensor.tensor}: expected shape "
        f"{list(tensor.shape)}, the manifest has {about}"
      )


def _same(a: Any, b: Any) -> bool:
  if isinstance(a, dict) and isinstance(b, dict):
    return all(_same(a.get(key), b.get(key)) for key in a.keys() | b.keys())
  if isinstance(a, float) and isinstance(b, float | int):
    return math.isclose(a, b, rel_tol=_CLOSE)
  return a == b


def _check_file(path: pathlib.Path, about: Any) -> None:
  if not isinstance(about, dict):
    raise errors.CheckpointError(f"{path}: the manifest says nothing of it")
  if not path.is_file():
    raise errors.CheckpointError(f"{path}: the manifest names it; it is absent")
  if path.stat().st_size != about.get("bytes"):
    raise errors.CheckpointError(
      f"{path}: {path.stat().st_size} bytes, the manifest says "
      f"{about.get('bytes')}: half-written or damaged"
    )
  found = _sha256(path)
  if found != about.get("sha256"):
    raise errors.CheckpointError(
      f"{path}: damaged: SHA-256 {found}, the manifest says "
      f"{about.get('sha256')}"
    )


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
