"""Training checkpoints: Orbax for the arrays, JSON for the rest, verified.

Invariants:
  1. A checkpoint counts once its manifest is on the disk, which is written
     last: the SHA-256 of every file (`manifest.py`).
  2. No checkpoint is deleted before a newer one counts.
  3. Nothing is restored before every file of it has been compared with the
     manifest. Orbax itself gives back a flipped bit without a word.
  4. At most one save is under way. A failed one is raised by the next call.

`save` returns when the arrays are copied out of the devices; writing goes on
in the background. Arrays are stored under flat names, so that evaluation can
read the parameters alone. A restart uses the newest checkpoint that is good,
and says loudly which ones are not; the trainer sets those aside as
`<step>.damaged`.
"""

from collections.abc import Mapping
import dataclasses
import logging
import pathlib
import shutil
import threading
from typing import Any

from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp

from forge_jax import errors
from forge_jax.model import decoder as decoder_lib
from forge_jax.trainer import manifest, update

_LOG = logging.getLogger(__name__)
_HEADROOM = 64 * 1024**2  # bytes kept free beside a checkpoint


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are written and which ones are kept."""

  every: int = 10  # trainer steps; 0: only when a run ends
  keep: int = 2  # the newest ones; one could be damaged
  keep_every: int = 0  # steps whose multiples are kept for good; 0: none
  # Most bytes, in 1e9, copied for writing at a time; at least the largest
  # array.
  concurrent_gb: float = 96.0

  def __post_init__(self):
    for name, least in (("every", 0), ("keep", 1), ("keep_every", 0)):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          f"checkpoint {name} is {getattr(self, name)}; expected at least "
          f"{least}"
        )


class Checkpointer:
  """The checkpoints of one run, in `<workdir>/checkpoints/<step>`."""

  def __init__(self, workdir: str | pathlib.Path, config: CheckpointConfig):
    self.config = config
    self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(
        host=ocp.JsonCheckpointHandler(),
        **{
          name: ocp.StandardCheckpointHandler(
            save_concurrent_gb=config.concurrent_gb
          )
          for name in ("params", "optimizer")
        },
      )
    )
    self._writing: threading.Thread | None = None
    self._failure: errors.CheckpointError | None = None

  @property
  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint; None: there is none."""
    return max(self.steps(), default=None)

  @property
  def oldest_step(self) -> int | None:
    """Step of the oldest of the `keep` newest complete ones, if there are.

    A restart goes no further back, but by hand.
    """
    newest = self.steps()[-self.config.keep :]
    return newest[0] if len(newest) == self.config.keep else None

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, good or damaged, ascending."""
    return sorted(
      int(path.name)
      for path in self.folder.glob("*")
      if path.name.isdecimal() and (path / manifest.NAME).exists()
    )

  def due(self, step: int) -> bool:
    """Whether the schedule asks for a checkpoint after this step."""
    return self.config.every > 0 and step % self.config.every == 0

  def save(
    self, step: int, state: update.TrainState, host: Mapping[str, Any]
  ) -> None:
    """Begins a checkpoint, after the one before it is complete.

    When it returns, the state may change. `wait` says when it is on disk.

    Args:
      step: trainer steps taken.
      state: parameters and optimizer.
      host: JSON values: the pool's cursor, seeds, versions.

    Raises:
      CheckpointError: the disk is full or fails; older checkpoints remain and
        no partial one does. Or the save before it failed.
    """
    self.wait()
    path = self.folder / str(step)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._require_space(step, state)
      if path.exists():  # of a history that was lost, or never completed
        _remove(path)
      self._orbax.save(
        path,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(decoder_lib.flatten(state.params)),
          optimizer=ocp.args.StandardSave(_flat(state.opt_state)),
          host=ocp.args.JsonSave(dict(host)),
        ),
      )
    except (OSError, ValueError, RuntimeError) as e:
      raise self._not_written(step, e) from e
    self._writing = threading.Thread(
      target=self._complete, args=(step,), name=f"checkpoint {step}"
    )
    self._writing.start()

  def wait(self) -> None:
    """Returns when no save is under way.

    Raises:
      CheckpointError: one has failed.
    """
    if self._writing is not None:
      self._writing.join()
      self._writing = None
    failure, self._failure = self._failure, None
    if failure is not None:
      raise failure

  def restore(
    self, template: update.TrainState, step: int | None = None
  ) -> tuple[update.TrainState, dict[str, Any]]:
    """Reads a checkpoint, the newest good one by default.

    Damaged ones that are newer are renamed to `<step>.damaged`.

    Args:
      template: a state of the right shapes and placement.
      step: which checkpoint.

    Returns:
      The state and the host values.

    Raises:
      CheckpointError: there is no such checkpoint, none is good, or it does
        not fit.
    """
    good, damaged = self._choose(step)
    restored = self._read(
      good,
      params=decoder_lib.flatten(template.params),
      optimizer=_flat(template.opt_state),
    )
    for bad in damaged:
      aside = self.folder / f"{bad}.damaged"
      if aside.exists():
        shutil.rmtree(aside)
      (self.folder / str(bad)).rename(aside)
    params = decoder_lib.unflatten(template.params, restored["params"])
    opt_state = _unflat(template.opt_state, restored["optimizer"])
    return update.TrainState(params, opt_state), restored["host"]

  def restore_decoder(
    self, decoder: decoder_lib.Decoder, step: int | None = None
  ) -> tuple[decoder_lib.Decoder, dict[str, Any]]:
    """A decoder like the given one with a checkpoint's parameters.

    The optimizer's state is not read, and nothing is renamed.

    Args:
      decoder: of the checkpoint's shape.
      step: which checkpoint, the newest good one by default.

    Returns:
      The decoder and the host values.

    Raises:
      CheckpointError: there is no such checkpoint, none is good, or it does
        not fit.
    """
    graph, template = nnx.split(decoder)
    good, _ = self._choose(step)
    restored = self._read(good, params=decoder_lib.flatten(template))
    state = decoder_lib.unflatten(template, restored["params"])
    return nnx.merge(graph, state), restored["host"]

  def close(self) -> None:
    """Waits for a save under way and releases Orbax's threads.

    Raises:
      CheckpointError: the save failed.
    """
    try:
      self.wait()
    finally:
      self._orbax.close()

  def _require_space(self, step: int, state: update.TrainState) -> None:
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _HEADROOM
    free = shutil.disk_usage(self.folder).free
    # Compression may save some of it; a checkpoint that might not fit is not
    # begun, so that a full disk is found before anything is written.
    if free < need:
      raise errors.CheckpointError(
        f"checkpoint of step {step} needs {need / 1e9:.2f} GB in "
        f"{self.folder}; {free / 1e9:.2f} GB are free"
      )

  def _complete(self, step: int) -> None:
    """Runs on a thread of its own: the manifest, then what is not kept."""
    try:
      self._orbax.wait_until_finished()
      manifest.write(self.folder / str(step))
    except (OSError, ValueError, RuntimeError) as e:
      self._failure = self._not_written(step, e)
      self._failure.__cause__ = e
      return
    try:
      self._prune()
    except OSError as e:
      _LOG.warning("%s: old checkpoints stay: %s", self.folder, e)

  def _not_written(self, step: int, error: Exception) -> errors.CheckpointError:
    for partial in (
      self.folder / str(step),
      *self.folder.glob(f"{step}.*tmp*"),
    ):
      shutil.rmtree(partial, ignore_errors=True)
    return errors.CheckpointError(
      f"checkpoint of step {step} in {self.folder} could not be written: "
      f"{error}"
    )

  def _prune(self) -> None:
    """Removes what the policy does not keep, and what a crash left."""
    steps = self.steps()
    kept = set(steps[-self.config.keep :])
    if self.config.keep_every:
      kept |= {s for s in steps if s % self.config.keep_every == 0}
    for path in self.folder.glob("*"):
      number, _, rest = path.name.partition(".")
      unfinished = rest and "tmp" in rest
      dropped = path.name.isdecimal() and int(number) not in kept
      if number.isdecimal() and (unfinished or dropped):
        _remove(path)

  def _choose(self, step: int | None) -> tuple[int, list[int]]:
    """The newest good checkpoint, and the damaged ones that are newer."""
    if step is not None:
      steps = [step] if step in self.steps() else []
    else:
      steps = self.steps()
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    if not steps:
      raise errors.CheckpointError(f"there is no {wanted} in {self.folder}")
    damaged = []
    for found in reversed(steps):
      faults = manifest.faults(self.folder / str(found))
      if not faults:
        if damaged:
          _LOG.error(
            "FALLING BACK to the checkpoint of step %d: what was trained in "
            "steps %d to %d is trained again",
            found,
            found + 1,
            damaged[0],
          )
        return found, damaged
      damaged.append(found)
      _LOG.error(
        "DAMAGED checkpoint of step %d in %s: %s",
        found,
        self.folder,
        "; ".join(faults),
      )
    raise errors.CheckpointError(
      f"no {wanted} in {self.folder} is good; damaged: "
      f"{', '.join(map(str, damaged))}"
    )

  def _read(
    self, step: int, **items: Mapping[str, jax.Array]
  ) -> Mapping[str, Any]:
    """The named items and the host values, shaped and placed as given."""
    path = self.folder / str(step)
    where = f"checkpoint of step {step} in {self.folder}"
    try:
      # Orbax reads all arrays at once, and when one does not fit it leaves the
      # others' reads running: what does not fit is found before any is read.
      stored = self._orbax.metadata(path).item_metadata
      for item, template in items.items():
        _check_fits(where, item, stored[item], template)
      return self._orbax.restore(
        path,
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


def _remove(path: pathlib.Path) -> None:
  """Deletes a checkpoint; on the way it does not count as complete."""
  (path / manifest.NAME).unlink(missing_ok=True)
  shutil.rmtree(path)


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
