"""JSON files of a model's folder, and what makes a folder durable."""

from collections.abc import Mapping
import json
import os
import pathlib

from forge_jax import errors


def read_json(path: pathlib.Path) -> dict:
  """The JSON object of a file.

  Raises:
    CheckpointError: it cannot be read or holds something else.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise errors.CheckpointError(
      f"{path}: cannot be read: {error.strerror}"
    ) from error
  except ValueError as error:
    raise errors.CheckpointError(f"{path}: not JSON: {error}") from error
  if not isinstance(value, dict):
    raise errors.CheckpointError(
      f"{path}: expected a JSON object, found {type(value).__name__}"
    )
  return value


def write_json(path: pathlib.Path, value: Mapping) -> None:
  """Writes a JSON object and waits until it is on the disk."""
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  flush(path)


def flush(path: pathlib.Path) -> None:
  """Waits until a file's content, or a folder's names, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
