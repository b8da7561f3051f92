"""How the pictures of the documents look, and how they become files."""

from collections.abc import Callable, Mapping, Sequence
import io
import pathlib
import re

from absl import app, flags
import matplotlib as mpl
from matplotlib import axes, figure

_FOLDER = flags.DEFINE_string("folder", "docs/images", "where they go")
# Of experiments that draw what they measured.
PICTURE = flags.DEFINE_bool("picture", False, "write a picture to --folder")

INK, MUTED, LINE = "#1f2328", "#667085", "#d0d5dd"
SERIES = ("#2f6fde", "#d9730d", "#0f9d76", "#8a5cd6")
FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"


def title() -> dict[str, object]:
  """Arguments of a title."""
  return {"loc": "left", "fontsize": 9.5, "color": INK}


def label() -> dict[str, object]:
  """Arguments of a small text."""
  return {"fontsize": 8.5, "color": MUTED}


def plain(ax: axes.Axes, x: str = "", y: str = "") -> None:
  """A quiet coordinate system: a grid of levels, nothing else."""
  ax.grid(axis="y", color=LINE, linewidth=0.6)
  ax.spines[["top", "right", "left"]].set_visible(False)
  ax.spines["bottom"].set_color(LINE)
  ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
  ax.set_xlabel(x, color=MUTED, fontsize=9)
  ax.set_ylabel(y, color=MUTED, fontsize=9)


def canvas(width: float, height: float) -> figure.Figure:
  """An empty picture; inches."""
  return figure.Figure((width, height), facecolor="white", layout="constrained")


def svg(name: str, picture: figure.Figure) -> str:
  """The same text for the same picture, whenever it is drawn."""
  buffer = io.StringIO()
  nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
  with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
    picture.savefig(buffer, format="svg", metadata=nothing)
  return re.sub(r"'DejaVu Sans'[^;\"]*", FONT, buffer.getvalue())


def write(name: str, picture: figure.Figure) -> None:
  """Writes a picture as `<name>.svg` into --folder and prints where."""
  folder = pathlib.Path(_FOLDER.value)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"{name}.svg"
  path.write_text(svg(name, picture), encoding="utf-8")
  print(path)


def run(pictures: Mapping[str, Callable[[], figure.Figure]]) -> None:
  """The main of a program that draws pictures, by their names."""

  def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    for name, draw in pictures.items():
      write(name, draw())

  app.run(main)
