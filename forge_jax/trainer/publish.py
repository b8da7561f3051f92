"""Publishes weights for engines of other processes: a folder per version.

Invariants:
  - What is published is whole: see `model.published`.
  - The last `keep` versions stay, so that an engine that is still reading the
    last but one does not lose it; others, and what a crash left, are removed.
"""

import dataclasses
import pathlib
import re
import shutil

import numpy as np

from forge_jax import errors, types
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import published

_NAME = re.compile(r"v(\d+)")


@dataclasses.dataclass(frozen=True)
class PublishConfig:
  """Where versions go and how many stay."""

  folder: str
  keep: int = 2

  def __post_init__(self):
    if self.keep < 1:
      raise errors.ConfigError(f"keep={self.keep}; expected at least 1")


class Publisher:
  """Writes versions of one model's weights."""

  def __init__(self, config: PublishConfig, model: model_config.ModelConfig):
    """Removes what an earlier process left unfinished in the folder."""
    self._folder = pathlib.Path(config.folder).absolute()
    self._keep = config.keep
    self._model = model
    for path in self._folder.glob(".v*.*"):
      shutil.rmtree(path, ignore_errors=True)

  def publish(self, weights: types.WeightsVersion) -> types.WeightsVersion:
    """Writes a version that holds arrays; returns it as a path.

    A run that continues from an earlier step publishes its versions again.

    Raises:
      CheckpointError: the weights are not finite or do not fit the model, or
        the disk is full or cannot be written to.
    """
    params = {
      name: np.asarray(array)
      for name, array in decoder_lib.flatten(weights.params).items()
    }
    path = self._folder / f"v{weights.version}"
    if path.exists():
      path.rename(self._folder / f".v{weights.version}.replaced")
    published.write(path, self._model, params, weights.version)
    self._prune(weights.version)
    return types.WeightsVersion(weights.version, path=str(path))

  def _prune(self, newest: int) -> None:
    """Removes all but the newest versions; later ones are of another run."""
    kept = range(newest - self._keep + 1, newest + 1)
    for path in self._folder.iterdir():
      match = _NAME.fullmatch(path.name)
      if path.name.endswith(".replaced") or (
        match and int(match[1]) not in kept
      ):
        shutil.rmtree(path, ignore_errors=True)
