"""Line charts as SVG text whose colours are CSS variables.

Matplotlib draws with placeholder colours; each is then replaced by a variable,
so that one drawing serves light and dark pages. `VARIABLES` gives the values;
a page, or a picture that stands alone, carries it in a style element.
"""

from collections.abc import Sequence
import dataclasses
import io
import math
import re

import matplotlib as mpl
from matplotlib import axes, figure, ticker

Point = tuple[float, float]

_LIGHT = {
  "surface": "#ffffff",
  "ink": "#1f2328",
  "muted": "#667085",
  "line": "#e4e7ec",
  "series-0": "#2f6fde",
  "series-1": "#d9730d",
  "series-2": "#0f9d76",
  "series-3": "#8a5cd6",
}
_DARK = {
  "surface": "#191d23",
  "ink": "#e6e8eb",
  "muted": "#98a1ad",
  "line": "#303741",
  "series-0": "#6ea2ff",
  "series-1": "#f0a04b",
  "series-2": "#43c59e",
  "series-3": "#b694f4",
}
# Colours that nothing else in a drawing has, in the order of the variables.
_PLACEHOLDER = {name: f"#0102{i:02x}" for i, name in enumerate(_LIGHT)}
_FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"
_MOST_MARKED = 60  # points of a line; more would run into each other


def _declare(values: dict[str, str]) -> str:
  return "".join(f"--{name}:{value};" for name, value in values.items())


VARIABLES = (
  f":root{{{_declare(_LIGHT)}}}"
  f"@media (prefers-color-scheme:dark){{:root{{{_declare(_DARK)}}}}}"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
  """One line of a chart."""

  label: str
  points: Sequence[Point]  # (step, value); values that are not finite: gaps
  color: int  # 0..3
  dashed: bool = False


def line_chart(
  name: str,
  series: Sequence[Series],
  *,
  percent: bool = False,
  log: bool = False,
  inches: tuple[float, float] = (4.6, 2.5),
) -> str | None:
  """Draws series over the step.

  Args:
    name: unique on the page; a prefix of the drawing's ids.
    series: at most four; those without a finite value are left out.
    percent: values are shares, on an axis from 0 to 100%.
    log: a logarithmic axis; values that are not positive are left out.
    inches: width and height, of 72 units each.

  Returns:
    An SVG element, or None when there is nothing to draw.
  """
  kept = [(s, _drawable(s.points, log)) for s in series]
  kept = [(s, points) for s, points in kept if points]
  if not kept:
    return None
  rc = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}
  with mpl.rc_context(rc):
    canvas = figure.Figure(inches, facecolor=_PLACEHOLDER["surface"])
    ax = canvas.add_subplot(facecolor="none")
    for one, points in kept:
      _draw(ax, one, points)
    _style(ax, percent=percent, log=log)
    if len(kept) > 1:
      _legend(ax, inches[1])
    canvas.tight_layout(pad=0.6)
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    canvas.savefig(buffer, format="svg", metadata=nothing)
  return _clean(name, buffer.getvalue())


def standalone(svg: str) -> str:
  """An SVG file of its own, of a drawing that `line_chart` made."""
  head, rest = svg.split(">", 1)
  return (
    f'{head} xmlns="http://www.w3.org/2000/svg"'
    ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    f"<style>{VARIABLES}</style>{rest}\n"
  )


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
  return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _draw(ax: axes.Axes, one: Series, points: Sequence[Point]) -> None:
  ax.plot(
    [x for x, _ in points],
    [y for _, y in points],
    color=_PLACEHOLDER[f"series-{one.color}"],
    linestyle="--" if one.dashed else "-",
    linewidth=1.8,
    marker="o" if len(points) <= _MOST_MARKED else "",
    markersize=3.5,
    markeredgewidth=0,
    label=one.label,
  )


def _style(ax: axes.Axes, *, percent: bool, log: bool) -> None:
  ax.spines[["top", "right", "left"]].set_visible(False)
  ax.spines["bottom"].set_color(_PLACEHOLDER["line"])
  ax.grid(axis="y", color=_PLACEHOLDER["line"], linewidth=0.8)
  ax.set_axisbelow(True)
  ax.tick_params(
    which="both", length=0, colors=_PLACEHOLDER["muted"], labelsize=8.5
  )
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
  ax.set_xlabel("step", color=_PLACEHOLDER["muted"], fontsize=8.5)
  if log:
    ax.set_yscale("log")
    low, high = ax.dataLim.intervaly
    bottom = math.floor(math.log10(low))
    # Whole decades: at least two of them are labelled.
    top = max(math.ceil(math.log10(high)), bottom + 1)
    ax.set_ylim(0.9 * 10.0**bottom, 1.1 * 10.0**top)
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    # Plain text: the mathematical notation would be drawn as outlines.
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(_power))
  elif not ax.dataLim.intervaly.any():
    ax.set_ylim(0, 1)  # all zero: not an axis around it
  if percent:
    ax.set_ylim(-0.02, 1.04)
    ax.yaxis.set_major_locator(ticker.FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))


def _power(value: float, position: int | None) -> str:
  del position
  if 0.001 <= value < 1e4:
    return f"{value:g}"
  return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _legend(ax: axes.Axes, height: float) -> None:
  legend = ax.legend(
    loc="lower left",
    bbox_to_anchor=(-0.02, 1 + 0.02 / height),
    ncols=4,
    frameon=False,
    fontsize=8.5,
    handlelength=1.4,
    columnspacing=1.2,
    handletextpad=0.5,
  )
  for text in legend.get_texts():
    text.set_color(_PLACEHOLDER["ink"])


def _clean(name: str, svg: str) -> str:
  """Strips the preamble, prefixes ids, puts variables for placeholders."""
  svg = svg[svg.index("<svg") :].strip()
  svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
  # A style element in a page's drawing would style the whole page.
  svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
  svg = svg.replace("<svg", '<svg stroke-linejoin="round"', 1)
  svg = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg)
  svg = re.sub(r'\bid="', f'id="{name}-', svg)
  svg = re.sub(r'href="#', f'href="#{name}-', svg)
  svg = re.sub(r"url\(#", f"url(#{name}-", svg)
  svg = re.sub(r"font-family: [^;]*;", f"font-family: {_FONT};", svg)
  for variable, color in _PLACEHOLDER.items():
    svg = svg.replace(color, f"var(--{variable})")
  return svg
