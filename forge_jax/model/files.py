"""Reads a model from wherever it is: a GGUF file, a folder, a package."""

import os

import numpy as np

from forge_jax import paths
from forge_jax.model import config as model_config
from forge_jax.model import gguf, huggingface


def read_model(
  path: str | os.PathLike[str],
) -> tuple[model_config.ModelConfig, dict[str, np.ndarray]]:
  """Reads a decoder's shape and its parameters.

  Args:
    path: a GGUF file, a folder in the Hugging Face format, or
      "package:<distribution>" for the GGUF file of an installed package.

  Returns:
    The shape, and float32 parameters by the names in `decoder.py`.

  Raises:
    CheckpointError: there is no model, or it cannot be read; the message
      names the file and the tensor or key.
  """
  found = paths.resolve_model_path(path)
  if found.is_dir():
    return huggingface.read_huggingface(found)
  return gguf.read_gguf(found)
