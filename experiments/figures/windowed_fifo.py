"""The pictures of docs/windowed_fifo.md, drawn from what the scheduler does.

Question: which groups may be taken, and which may be begun?

Command: python -m experiments.figures.windowed_fifo [--folder=docs/images]
Hardware: any; a second.
Result: windowed_fifo_rule.svg, windowed_fifo_bounds.svg.

The states come from `pool.windowed_fifo`. What the simulator measures is drawn
by `python -m experiments.windowed_fifo --folder=docs/images`.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses

from matplotlib import axes, figure, patches
import numpy as np

from experiments.figures import drawing
from forge_jax.pool import window as window_lib
from forge_jax.pool import windowed_fifo

CONSUMED, TAKEABLE, BLOCKED, RUNNING, NEW = range(5)
COLORS = ("#2f9e78", "#f2c94c", "#f7e6b0", "#b8c4d6", "#ffffff")
LABELS = (
  "consumed",
  "completed, may be taken",
  "completed, blocked",
  "in progress",
  "not submitted",
)


@dataclasses.dataclass(frozen=True)
class Frame:
  """A scheduler's state at one moment."""

  text: str
  status: tuple[int, ...]  # of the first items
  head: int
  width: int  # W
  capacity: int  # N


class Film:
  """Frames of one scheduler's life."""

  def __init__(self, items: int, capacity: int, width: int):
    self.frames: list[Frame] = []
    self._items = items
    self._config = window_lib.WindowConfig(
      in_flight=capacity, window=width, max_lag=None, groups_per_step=1
    )
    self._fifo = windowed_fifo.WindowedFifo(self._config)
    self._completed: set[int] = set()
    self._consumed: set[int] = set()

  def submit(self) -> None:
    """Submits as many as may be."""
    for _ in range(self._fifo.admissible(0)):
      self._fifo.submit()

  def complete(self, items: Iterable[int]) -> None:
    """Completes items that were submitted."""
    for item in items:
      self._fifo.complete(item)
      self._completed.add(item)

  def take(self) -> None:
    """Takes all that may be taken."""
    taken, _ = self._fifo.take(self._fifo.available())
    self._consumed.update(ticket.index for ticket in taken)

  def shoot(self, text: str) -> None:
    """Keeps the state of this moment."""
    takeable = self._fifo.takeable()

    def status(item: int) -> int:
      if item in self._consumed:
        return CONSUMED
      if item in self._completed:
        return TAKEABLE if item in takeable else BLOCKED
      return RUNNING if item < self._fifo.submitted else NEW

    self.frames.append(
      Frame(
        text,
        tuple(map(status, range(self._items))),
        self._fifo.head,
        self._config.width,
        self._config.capacity,
      )
    )


def rule_frames() -> list[Frame]:
  """The rule and its figure for N = 8, W = 4."""
  film = Film(items=16, capacity=8, width=4)
  film.submit()
  film.complete([1, 2, 5, 6])
  film.shoot("Inside the window any completed item may be taken; outside none.")
  film.take()
  film.complete([3])
  film.take()
  film.shoot("1, 2 and 3 are consumed. 0 runs on: the head, so all, waits.")
  film.complete([0])
  film.take()
  film.submit()
  film.shoot("0 is consumed: the head moves past all that are, and N follows.")
  film.complete([4])
  film.take()
  film.submit()
  film.complete(range(8, 15))
  film.take()
  film.shoot(
    "Worst case: of 0 to 10 only 7 is not consumed, 3 have overtaken it."
  )
  return film.frames


def rule_picture() -> figure.Figure:
  """One row a frame: items, the window and what may be in flight."""
  frames = rule_frames()
  canvas = drawing.canvas(7.4, 1.22 * len(frames) + 0.5)
  rows = canvas.subplots(len(frames), 1)
  for ax, frame in zip(rows, frames, strict=True):
    _draw(ax, frame)
  handles = [
    patches.Patch(facecolor=color, edgecolor=drawing.MUTED, label=label)
    for color, label in zip(COLORS, LABELS, strict=True)
  ]
  canvas.legend(
    handles=handles,
    loc="outside lower center",
    ncols=5,
    frameon=False,
    fontsize=8.5,
    labelcolor=drawing.INK,
  )
  return canvas


def _draw(ax: axes.Axes, frame: Frame) -> None:
  for item, status in enumerate(frame.status):
    ax.add_patch(
      patches.Rectangle(
        (item - 0.44, -0.44),
        0.88,
        0.88,
        facecolor=COLORS[status],
        edgecolor=drawing.LINE if status == NEW else "none",
        linewidth=0.8,
      )
    )
    color = "white" if status == CONSUMED else drawing.INK
    ax.text(
      item, 0, str(item), ha="center", va="center", fontsize=8.5, color=color
    )
  _bracket(ax, frame.head, frame.width, 0.62, f"window W = {frame.width}", True)
  _bracket(ax, frame.head, frame.capacity, 0.95, f"N = {frame.capacity}", False)
  ax.set(xlim=(-0.7, len(frame.status) + 1.6), ylim=(1.35, -0.6))
  ax.set_title(frame.text, **drawing.title())
  ax.axis("off")


def _bracket(
  ax: axes.Axes, head: int, size: int, y: float, text: str, strong: bool
) -> None:
  color = drawing.INK if strong else drawing.MUTED
  left, right = head - 0.44, head + size - 0.56
  ax.plot(
    [left, left, right, right],
    [y - 0.1, y, y, y - 0.1],
    color=color,
    linewidth=1.6 if strong else 0.9,
  )
  ax.text(
    right + 0.2, y, text, va="center", **drawing.label() | {"color": color}
  )


def bounds_picture() -> figure.Figure:
  """The most optimizer steps between a group's start and its training."""
  capacity, share = 8192, np.linspace(0, 1, 101)
  width = np.maximum(1, np.round(share * capacity))
  canvas = drawing.canvas(7.4, 2.7)
  ax = canvas.subplots()
  for batch, color in zip((256, 512, 1024, 2048), drawing.SERIES, strict=True):
    lag = (capacity + width - 2) // batch
    ax.plot(share, lag, color=color, label=f"P = {batch}")
  ax.set(xlim=(0, 1), ylim=(0, None))
  drawing.plain(ax, "W as a share of N = 8192", "optimizer steps")
  ax.set_title("largest lag: (N + W - 2) / P, rounded down", **drawing.title())
  ax.legend(frameon=False, fontsize=8.5, labelcolor=drawing.INK, ncols=4)
  return canvas


def simulated(
  drift: Mapping[str, np.ndarray], lag: Mapping[str, np.ndarray], step: int
) -> figure.Figure:
  """What a simulation measured.

  Args:
    drift: by policy, at every step from the first that it is known of.
    lag: by policy, of every group in groups.
    step: groups of an optimizer step.
  """
  canvas = drawing.canvas(7.4, 3.1)
  over_time, histogram = canvas.subplots(1, 2)
  colors = (
    drawing.MUTED,
    *drawing.SERIES[2:],
    *drawing.SERIES[:2],
    drawing.INK,
  )
  for (name, values), color in zip(drift.items(), colors, strict=False):
    wide = 2.0 if name == "0.3 N" else 1.1
    over_time.plot(values, color=color, linewidth=wide, label=name)
    counts, edges = np.histogram(
      lag[name] / step,
      bins=np.arange(0, max(map(np.max, lag.values())) / step + 1),
    )
    histogram.stairs(
      counts / len(lag[name]), edges, color=color, linewidth=wide
    )
  drawing.plain(over_time, "optimizer step")
  drawing.plain(histogram, f"lag, in steps of {step} groups")
  over_time.set_ylim(0, None)
  over_time.set_title("distance from what was asked for", **drawing.title())
  histogram.set_title("share of groups by lag", **drawing.title())
  canvas.legend(
    *over_time.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=6,
    frameon=False,
    fontsize=8.5,
    labelcolor=drawing.INK,
  )
  return canvas


def adapted(width: np.ndarray, drift: np.ndarray) -> figure.Figure:
  """What an adaptive window did.

  Args:
    width: W as a share of N, at every step.
    drift: as in `simulated`.
  """
  canvas = drawing.canvas(7.4, 2.9)
  window, distance = canvas.subplots(1, 2)
  window.plot(width, color=drawing.SERIES[0], linewidth=1.3)
  distance.plot(drift, color=drawing.SERIES[1], linewidth=1.3)
  for ax, title in (
    (window, "the window, as a share of N"),
    (distance, "distance from what was asked for"),
  ):
    drawing.plain(ax, "optimizer step")
    ax.set_ylim(0, None)
    ax.set_title(title, **drawing.title())
  return canvas


PICTURES: Mapping[str, Callable[[], figure.Figure]] = {
  "windowed_fifo_rule": rule_picture,
  "windowed_fifo_bounds": bounds_picture,
}


if __name__ == "__main__":
  drawing.run(PICTURES)
