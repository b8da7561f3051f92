"""The runs of an experiment: where they are kept, and the flags about them."""

from collections.abc import Callable, Mapping
import pathlib

from absl import flags

from forge_jax.observe import metrics

SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "one run of each arm for each")
_FOLDER = flags.DEFINE_string(
  "runs", "runs", "folder of all runs; one that is there is not repeated"
)

Curve = list[tuple[int, Mapping[str, float]]]  # metrics by step


def place(experiment: str, arm: str, seed: int) -> pathlib.Path:
  """The folder of a run."""
  return pathlib.Path(_FOLDER.value) / experiment / f"{arm}-seed{seed}"


def kept(folder: pathlib.Path, make: Callable[[], Curve]) -> pathlib.Path:
  """Writes a run's metrics.jsonl, unless it is there; returns its folder."""
  path = folder / "metrics.jsonl"
  if not path.exists():
    curve = make()
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with metrics.Metrics([metrics.JsonlWriter(partial)]) as records:
      for step, values in curve:
        records.write(step, values)
    partial.rename(path)
  return folder
