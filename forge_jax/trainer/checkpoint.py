"""Training checkpoints: Orbax for the arrays, JSON for the rest.

A checkpoint appears whole or not at all: Orbax writes into a temporary folder
that it renames when everything is on disk. Arrays are stored under flat names,
so that evaluation can read the parameters alone.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import shutil
from typing import Any

from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp

from forge_jax import errors
from forge_jax.model import decoder as decoder_lib
from forge_jax.trainer import update

_HEADROOM = 64 * 1024**2  # bytes kept free beside a checkpoint


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are written and how many are kept."""

  every: int = 10  # trainer steps; 0: only when a run ends
  keep: int = 1
  # Most bytes, in 1e9, copied for writing at a time; at least the largest
  # array.
  concurrent_gb: float = 96.0


class Checkpointer:
  """The checkpoints of one run, in `<workdir>/checkpoints/<step>`."""

  def __init__(self, workdir: str | pathlib.Path, config: CheckpointConfig):
    self.config = config
    self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.keep,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
      ),
      item_handlers={
        name: ocp.StandardCheckpointHandler(
          save_concurrent_gb=config.concurrent_gb
        )
        for name in ("params", "optimizer")
      }
      | {"host": ocp.JsonCheckpointHandler()},
    )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint; None: there is none."""
    return self._manager.latest_step()

  def due(self, step: int) -> bool:
    """Whether the schedule asks for a checkpoint after this step."""
    return self.config.every > 0 and step % self.config.every == 0

  def save(
    self, step: int, state: update.TrainState, host: Mapping[str, Any]
  ) -> None:
    """Writes a checkpoint; returns when it is on disk.

    Args:
      step: trainer steps taken.
      state: parameters and optimizer.
      host: JSON values: the pool's cursor, seeds, versions.

    Raises:
      CheckpointError: the disk is full or fails; older checkpoints remain and
        no partial one does.
    """
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _HEADROOM
    free = shutil.disk_usage(self.folder).free
    # Compression may save some of it; a checkpoint that might not fit is not
    # begun, so that a full disk is found before anything is written.
    if free < need:
      raise errors.CheckpointError(
        f"checkpoint of step {step} needs {need / 1e9:.2f} GB in "
        f"{self.folder}; {free / 1e9:.2f} GB are free"
      )
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(decoder_lib.flatten(state.params)),
          optimizer=ocp.args.StandardSave(_flat(state.opt_state)),
          host=ocp.args.JsonSave(dict(host)),
        ),
        force=True,
      )
      self._manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as e:
      for partial in self.folder.glob(f"{step}.*tmp*"):
        shutil.rmtree(partial, ignore_errors=True)
      raise errors.CheckpointError(
        f"checkpoint of step {step} in {self.folder} could not be written: {e}"
      ) from e

  def restore(
    self, template: update.TrainState, step: int | None = None
  ) -> tuple[update.TrainState, dict[str, Any]]:
    """Reads a checkpoint, the newest by default.

    Args:
      template: a state of the right shapes and placement.
      step: which checkpoint.

    Returns:
      The state and the host values.

    Raises:
      CheckpointError: there is no such checkpoint, or it does not fit.
    """
    restored = self._read(
      step,
      params=decoder_lib.flatten(template.params),
      optimizer=_flat(template.opt_state),
    )
    params = decoder_lib.unflatten(template.params, restored["params"])
    opt_state = _unflat(template.opt_state, restored["optimizer"])
    return update.TrainState(params, opt_state), restored["host"]

  def restore_decoder(
    self, decoder: decoder_lib.Decoder, step: int | None = None
  ) -> tuple[decoder_lib.Decoder, dict[str, Any]]:
    """A decoder like the given one with a checkpoint's parameters.

    The optimizer's state is not read.

    Args:
      decoder: of the checkpoint's shape.
      step: which checkpoint, the newest by default.

    Returns:
      The decoder and the host values.

    Raises:
      CheckpointError: there is no such checkpoint, or it does not fit.
    """
    graph, template = nnx.split(decoder)
    restored = self._read(step, params=decoder_lib.flatten(template))
    state = decoder_lib.unflatten(template, restored["params"])
    return nnx.merge(graph, state), restored["host"]

  def close(self) -> None:
    """Releases Orbax's threads."""
    self._manager.close()

  def _read(
    self, step: int | None, **items: Mapping[str, jax.Array]
  ) -> Mapping[str, Any]:
    """The named items and the host values, shaped and placed as given."""
    step = self.latest_step if step is None else step
    if step is None:
      raise errors.CheckpointError(f"there is no checkpoint in {self.folder}")
    where = f"checkpoint of step {step} in {self.folder}"
    try:
      # Orbax reads all arrays at once, and when one does not fit it leaves the
      # others' reads running: what does not fit is found before any is read.
      stored = self._manager.item_metadata(step)
      for item, template in items.items():
        _check_fits(where, item, stored[item], template)
      return self._manager.restore(
        step,
        args=ocp.args.Composite(
          host=ocp.args.JsonRestore(),
          **{
            item: ocp.args.StandardRestore(_abstract(template))
            for item, template in items.items()
          },
        ),
      )
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise errors.CheckpointError(f"{where} could not be read: {e}") from e


def _check_fits(
  where: str,
  item: str,
  stored: Mapping[str, Any] | None,
  template: Mapping[str, jax.Array],
) -> None:
  """Raises CheckpointError unless an item's arrays are the template's."""
  if stored is None:
    raise errors.CheckpointError(f"{where} has no {item}")
  missing, unknown = (
    template.keys() - stored.keys(),
    stored.keys() - template.keys(),
  )
  if missing or unknown:
    raise errors.CheckpointError(
      f"{where} does not fit, {item}: missing {sorted(missing)}, "
      f"unknown {sorted(unknown)}"
    )
  for name, leaf in template.items():
    if tuple(stored[name].shape) != leaf.shape:
      raise errors.CheckpointError(
        f"{where} does not fit, {item} {name}: expected shape {leaf.shape}, "
        f"found {tuple(stored[name].shape)}"
      )


def _flat(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def _unflat(template: Any, flat: Mapping[str, Any]) -> Any:
  names = list(_flat(template))
  structure = jax.tree.structure(template)
  return jax.tree.unflatten(structure, [flat[name] for name in names])


def _abstract(flat: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    name: jax.ShapeDtypeStruct(
      np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None)
    )
    for name, leaf in flat.items()
  }
