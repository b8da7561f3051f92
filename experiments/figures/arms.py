"""Draws the arms of an experiment: metrics by trainer step, a line a run.

python -m experiments.figures.arms --name=parallel_calls \
  --arms="no speed reward=runs/plain0,runs/plain1" \
  --arms="speed reward=runs/speed0,runs/speed1" \
  --metrics=train/success,train/seconds
"""

from collections.abc import Mapping, Sequence
import pathlib

from absl import app, flags
from matplotlib import figure

from experiments.figures import drawing
from forge_jax.observe import metrics as metrics_lib

_NAME = flags.DEFINE_string("name", None, "Of the picture.")
_ARMS = flags.DEFINE_multi_string("arms", None, "LABEL=RUN,RUN: one an arm.")
_METRICS = flags.DEFINE_list("metrics", None, "One panel each.")


def read(run: pathlib.Path, metric: str) -> tuple[list[int], list[float]]:
  """Steps and values of a metric in a run's records.

  Raises:
    FileNotFoundError: it holds no records.
  """
  path = run / "metrics.jsonl"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist: no run is there")
  found = [
    (event.step, event.values[metric])
    for event in metrics_lib.read_jsonl(path)
    if metric in event.values
  ]
  return [step for step, _ in found], [value for _, value in found]


def draw(
  arms: Mapping[str, Sequence[pathlib.Path]], metrics: Sequence[str]
) -> figure.Figure:
  """A panel a metric, a colour an arm, a line a run."""
  return curves(
    {
      metric: {
        label: [read(run, metric) for run in runs]
        for label, runs in arms.items()
      }
      for metric in metrics
    }
  )


def curves(
  panels: Mapping[str, Mapping[str, Sequence[tuple[list[int], list[float]]]]],
) -> figure.Figure:
  """Panels by title, in each the arms by label, each of a curve a run."""
  picture = drawing.canvas(3.3 * len(panels), 2.6)
  axes = picture.subplots(1, len(panels), squeeze=False)[0]
  for panel, (title, arms) in zip(axes, panels.items(), strict=True):
    for colour, (label, runs) in zip(
      drawing.SERIES, arms.items(), strict=False
    ):
      for n, (steps, values) in enumerate(runs):
        panel.plot(
          steps, values, color=colour, linewidth=1.4, label=None if n else label
        )
    panel.set_title(title, **drawing.title())
    drawing.plain(panel, x="trainer step")
    panel.set_ylim(bottom=0)
  axes[0].legend(frameon=False, fontsize=8, labelcolor=drawing.MUTED)
  return picture


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  arms = {}
  for text in _ARMS.value:
    label, _, runs = text.rpartition("=")
    arms[label] = [pathlib.Path(run) for run in runs.split(",")]
  drawing.write(_NAME.value, draw(arms, _METRICS.value))


if __name__ == "__main__":
  flags.mark_flags_as_required(["name", "arms", "metrics"])
  flags.FLAGS.set_default("folder", "docs/results")
  app.run(main)
