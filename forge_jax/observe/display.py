"""What a person sees while a run goes on: a live panel, or a line a step.

Invariants:

1. On a terminal one panel is redrawn in place; elsewhere (a pipe, a log file)
   every step prints one plain line, so nothing is lost and nothing flickers.
2. The display only reads what it is given; it never waits for a value. Any
   thread may update it.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
import itertools
import math
import threading
import time
from types import TracebackType
from typing import Any, Self

from rich import box, live, panel, progress_bar, table
from rich import console as console_lib
from rich import text as text_lib

from forge_jax.observe import metrics, names

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 32  # columns of the sparkline
_NOTES = 4  # notes kept under the panel's figures
_PACE_STEPS = 5  # steps whose mean duration predicts the time left
_RATES = (
  ("rollout", names.THROUGHPUT_ROLLOUT),
  ("training", names.THROUGHPUT_TRAINING),
  ("data", names.THROUGHPUT_DATA),
  ("I/O", names.THROUGHPUT_IO),
)
_EVALUATIONS = (
  ("held-out", names.EVAL_HELDOUT),
  ("unseen phrasings", names.EVAL_PHRASINGS),
)


class LiveDisplay:
  """A context manager that shows a run.

  Subscribe `observe` to the metrics for what is known once a step; `update`
  takes figures that change in between, such as the queue's.
  """

  def __init__(
    self,
    title: str,
    total_steps: int,
    console: console_lib.Console | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._title = title
    self._total = total_steps
    self._console = console or console_lib.Console()
    self._clock = clock
    self._lock = threading.RLock()
    self._started = clock()
    self._step = 0
    self._steps_seen = 0  # by this process; a resumed run begins later
    self._values: dict[str, float] = {}
    self._curve: list[float] = []
    self._pace: deque[float] = deque(maxlen=_PACE_STEPS)
    # By step, then by kind of tasks; the kinds may arrive one by one.
    self._evaluations: dict[int, dict[str, float]] = {}
    self._notes: deque[str] = deque(maxlen=_NOTES)
    self._live: live.Live | None = None

  def __enter__(self) -> Self:
    self._started = self._clock()
    if self._console.is_terminal:
      self._live = live.Live(
        console=self._console,
        get_renderable=self.render,
        refresh_per_second=4,
      )
      self._live.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None

  def observe(self, event: metrics.StepMetrics) -> None:
    """Shows a metric event; prints its line where there is no terminal."""
    with self._lock:
      self._step = max(self._step, event.step)
      self.update(event.values)
      evaluated = {
        label: event.values[name]
        for label, name in _EVALUATIONS
        if name in event.values
      }
      if evaluated:
        self._evaluations.setdefault(event.step, {}).update(evaluated)
      trained = names.TRAIN_REWARD in event.values
      if trained:
        self._steps_seen += 1
        self._curve.append(event.values.get(names.TRAIN_SUCCESS, math.nan))
      if names.TIME_STEP in event.values:
        self._pace.append(event.values[names.TIME_STEP])
      if not self._console.is_terminal:
        if trained:
          self._print(self._line())
        if evaluated:
          self._print(f"  greedy  {_evaluation(event.step, evaluated)}")

  def update(self, values: Mapping[str, float]) -> None:
    """Takes the newest figures, by the names in observe/names.py."""
    with self._lock:
      self._values.update(values)

  def note(self, text: str) -> None:
    """Shows a line of text: what is going on, in words."""
    with self._lock:
      self._notes.append(text)
      if not self._console.is_terminal:
        self._print(text)

  def summarize(self, summary: Mapping[str, Any]) -> None:
    """Prints the final table; see `summary_table`."""
    self._console.print(summary_table(summary))

  def render(self) -> console_lib.RenderableType:
    """The panel as it is now."""
    with self._lock:
      parts: list[console_lib.RenderableType] = [self._progress(), ""]
      grid = table.Table.grid(padding=(0, 2))
      grid.add_column(style="dim", no_wrap=True)
      grid.add_column()
      for label, content in self._rows():
        grid.add_row(label, content)
      parts.append(grid)
      if self._notes:
        parts.append("")
        parts += [text_lib.Text(n, style="dim italic") for n in self._notes]
      return panel.Panel(
        console_lib.Group(*parts),
        title=text_lib.Text(self._title, style="bold"),
        title_align="left",
        box=box.ROUNDED,
        border_style="cyan",
        padding=(0, 1),
        width=min(self._console.width, 88),
      )

  def _progress(self) -> console_lib.RenderableType:
    grid = table.Table.grid(expand=True, padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_row(
      text_lib.Text(f"step {self._step}/{self._total}", style="bold"),
      progress_bar.ProgressBar(
        total=max(self._total, 1),
        completed=self._step,
        style="grey37",
        complete_style="cyan",
        finished_style="green",
      ),
      f"{_clock_text(self._elapsed())} elapsed, {self._left_text()} left",
    )
    return grid

  def _rows(self) -> Sequence[tuple[str, console_lib.RenderableType]]:
    get = self._values.get
    success = text_lib.Text.assemble(
      (_percent(get(names.TRAIN_SUCCESS)).rjust(6), "bold green"),
      "  ",
      (sparkline(self._curve, _CURVE_WIDTH), "green"),
    )
    reward = text_lib.Text.assemble(
      (_figure(get(names.TRAIN_REWARD), "+.3f").rjust(6), "bold"),
      f"  gradient norm {_figure(get(names.TRAIN_GRAD_NORM), '.3g')}",
      f"  entropy {_figure(get(names.TRAIN_ENTROPY), '.3f')}",
    )
    queue = (
      f"head {_figure(get(names.QUEUE_HEAD), '.0f')}"
      f"  in flight {_figure(get(names.QUEUE_IN_FLIGHT), '.0f')}"
      f"  complete, waiting {_figure(get(names.QUEUE_WAITING), '.0f')}"
    )
    weights = (
      f"version {_figure(get(names.WEIGHTS_VERSION), '.0f')}"
      f"  lag mean {_figure(get(names.LAG_MEAN), '.2f')}"
      f"  max {_figure(get(names.LAG_MAX), '.0f')}"
    )
    tree = (
      f"merged {_times(get(names.TREE_MERGE_RATIO))}"
      f" of {_times(get(names.TREE_POSSIBLE_RATIO))}"
      f"  FLOPs saved {_times(get(names.TREE_FLOP_BOUND))},"
      f" {_percent(get(names.TREE_ACHIEVED))} of it achieved"
    )
    mismatch = (
      f"max {_figure(get(names.MISMATCH_MAX), '.1e')}"
      f"  mean {_figure(get(names.MISMATCH_MEAN), '.1e')}"
      f"  ratio clipped {_percent(get(names.RATIO_CLIPPED))}"
    )
    rates = "  ".join(f"{n} {_rate(get(name))}" for n, name in _RATES)
    rows: list[tuple[str, console_lib.RenderableType]] = [
      ("success", success),
      ("reward", reward),
      ("tokens/s", rates),
      ("queue", queue),
      ("weights", weights),
      ("tree", tree),
      ("mismatch", mismatch),
    ]
    if self._evaluations:
      rows.append(("greedy", self._evaluation_text()))
    return rows

  def _evaluation_text(self) -> text_lib.Text:
    steps = list(self._evaluations)
    if len(steps) > 3:  # the first shows where the run began
      steps = [steps[0], *steps[-2:]]
    lines = [_evaluation(step, self._evaluations[step]) for step in steps]
    return text_lib.Text("\n".join(lines), style="bold")

  def _line(self) -> str:
    get = self._values.get
    rates = ", ".join(f"{n} {_rate(get(name))}" for n, name in _RATES)
    return (
      f"step {self._step}/{self._total}"
      f"  reward {_figure(get(names.TRAIN_REWARD), '+.3f')}"
      f"  success {_percent(get(names.TRAIN_SUCCESS))}"
      f"  tokens/s: {rates}"
      f"  weights v{_figure(get(names.WEIGHTS_VERSION), '.0f')}"
      f"  mismatch {_figure(get(names.MISMATCH_MAX), '.1e')}"
      f"  {_clock_text(self._elapsed())} elapsed, {self._left_text()} left"
    )

  def _print(self, line: str) -> None:
    self._console.print(
      line, markup=False, highlight=False, soft_wrap=True, emoji=False
    )

  def _elapsed(self) -> float:
    return self._clock() - self._started

  def _left_text(self) -> str:
    if self._pace:
      pace = sum(self._pace) / len(self._pace)
    elif self._steps_seen:
      pace = self._elapsed() / self._steps_seen
    else:
      return "?"
    return _clock_text(pace * max(self._total - self._step, 0))


def summary_table(summary: Mapping[str, Any]) -> table.Table:
  """Success before and after, of a run's summary.

  Args:
    summary: holds heldout_before, heldout_after, phrasings_before and
      phrasings_after, 0..1; a figure that is absent or None shows as "-".
  """
  result = table.Table(
    box=box.ROUNDED, title="greedy success", title_style="bold"
  )
  result.add_column("tasks", no_wrap=True)
  for name in ("before", "after", "change"):
    result.add_column(name, justify="right", no_wrap=True)
  for key, label in (
    ("heldout", "held-out"),
    ("phrasings", "unseen phrasings"),
  ):
    before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
    known = before is not None and after is not None
    change = f"{100 * (after - before):+.1f} points" if known else "-"
    good = known and after > before
    result.add_row(
      label,
      _percent(before),
      text_lib.Text(_percent(after), style="bold green" if good else "bold"),
      change,
    )
  return result


def sparkline(values: Sequence[float], width: int) -> str:
  """Shares, 0..1, as one line of bars; more than `width` are averaged.

  A value that is NaN shows as a space.
  """
  if len(values) > width:
    edges = [len(values) * i // width for i in range(width + 1)]
    values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
  return "".join(
    " " if math.isnan(v) else _BARS[min(max(int(v * 8), 0), 7)] for v in values
  )


def _evaluation(step: int, success: Mapping[str, float]) -> str:
  shares = (f"{label} {_percent(share)}" for label, share in success.items())
  return f"step {step}: {', '.join(shares)}"


def _figure(value: float | None, spec: str) -> str:
  return "-" if value is None else format(value, spec)


def _times(value: float | None) -> str:
  return "-" if value is None else f"{value:.1f}x"


def _percent(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f}%"


def _rate(value: float | None) -> str:
  if value is None:
    return "-"
  for size, unit in ((1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.1f}{unit}"
  return f"{value:.0f}"


def _clock_text(seconds: float) -> str:
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return (
    f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
  )
