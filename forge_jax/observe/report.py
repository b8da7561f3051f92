"""A run's report: one HTML page that needs nothing beside itself.

Everything that comes from outside (names, transcripts, configuration) is
escaped, and the page's own policy forbids it to load or run anything.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import html
import json
import math
import os
import pathlib
from typing import Any

from forge_jax import types
from forge_jax.observe import charts, names, page_style

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TASKS = (("heldout", "Held-out"), ("phrasings", "Unseen phrasings"))
_RATES = (
  ("rollout", names.THROUGHPUT_ROLLOUT),
  ("training", names.THROUGHPUT_TRAINING),
  ("data", names.THROUGHPUT_DATA),
  ("I/O", names.THROUGHPUT_IO),
)


@dataclasses.dataclass(frozen=True, slots=True)
class RunRecord:
  """What a report is made of. Written by launch/."""

  name: str
  question: str  # what the experiment asks, from its docstring
  # heldout_before, heldout_after, phrasings_before, phrasings_after (0..1),
  # seconds, peak_rss_gb, steps, seed, versions (by package), and the figures
  # "yield/..." of names.py; one that is None or absent is not known.
  summary: Mapping[str, Any]
  metrics: Sequence[Mapping[str, Any]]  # rows of metrics.jsonl
  evaluations: Sequence[Mapping[str, Any]]  # step, heldout, phrasings
  # question; before and after: messages; reward_before and reward_after: the
  # total, or the parts of it by name.
  examples: Sequence[Mapping[str, Any]]
  config: Mapping[str, Any]  # resolved


def write_report(
  folder: str | os.PathLike[str], record: RunRecord
) -> pathlib.Path:
  """Writes `report.html` into the folder; returns its path."""
  path = pathlib.Path(folder) / "report.html"
  _write(path, _page(record))
  return path


def write_curve(path: str | os.PathLike[str], record: RunRecord) -> None:
  """Writes the picture of success by step as an SVG file.

  Raises:
    ValueError: the record holds no evaluation and no sampled success.
  """
  drawing = charts.line_chart(
    "curve", _success(record), percent=True, inches=(8, 3.6)
  )
  if drawing is None:
    raise ValueError(f"run {record.name!r} has no success to draw")
  _write(pathlib.Path(path), charts.standalone(drawing))


def _write(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)


def _page(record: RunRecord) -> str:
  return "\n".join(
    [
      "<!doctype html>",
      '<html lang="en"><head><meta charset="utf-8">',
      f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
      '<meta name="viewport" content="width=device-width,initial-scale=1">',
      f"<title>{_e(record.name)}</title>",
      f"<style>{charts.VARIABLES}{page_style.SHEET}</style></head><body><main>",
      f"<h1>{_e(record.name)}</h1>",
      f'<p class="muted">{_e(record.question)}</p>',
      f'<p class="claim">{_claim(record.summary)}</p>',
      "<h2>Before and after</h2>",
      _comparison(record.summary),
      "<h2>Curves</h2>",
      _curves(record),
      _examples(record.examples),
      "<h2>The run</h2>",
      _facts(record),
      "</main></body></html>\n",
    ]
  )


def _claim(summary: Mapping[str, Any]) -> str:
  before, after = (summary.get(f"heldout_{k}") for k in ("before", "after"))
  took = ""
  if summary.get("steps") is not None and summary.get("seconds") is not None:
    took = f" in {summary['steps']} steps, {_duration(summary['seconds'])}"
  return (
    "Greedy success on held-out tasks: "
    f"<b>{_percent(before)} &rarr; {_percent(after)}</b>{_e(took)}."
  )


def _comparison(summary: Mapping[str, Any]) -> str:
  rows = []
  for key, label in _TASKS:
    before, after = (summary.get(f"{key}_{k}") for k in ("before", "after"))
    change = "&ndash;"
    if before is not None and after is not None:
      change = f"{100 * (after - before):+.1f} points"
    cells = "".join(
      f'<td class="number">{cell}</td>'
      for cell in (_percent(before), _percent(after), change)
    )
    rows.append(f"<tr><th>{label}</th>{cells}</tr>")
  head = "".join(
    f'<th class="number">{name}</th>' for name in ("Before", "After", "Change")
  )
  return (
    '<div class="card"><table><thead><tr><th>Greedy success</th>'
    f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
  )


def _success(record: RunRecord) -> list[charts.Series]:
  evaluated = [
    charts.Series(
      label.lower(),
      [
        (row["step"], _value(row.get(key)))
        for row in sorted(record.evaluations, key=lambda row: row["step"])
      ],
      color,
    )
    for (key, label), color in zip(_TASKS, (0, 2), strict=True)
  ]
  sampled = charts.Series(
    "sampled in training", _points(record, names.TRAIN_SUCCESS), 1, dashed=True
  )
  return [*evaluated, sampled]


def _merging(record: RunRecord) -> list[charts.Series]:
  possible = _points(record, names.TREE_POSSIBLE_RATIO)
  return [
    charts.Series("tokens", _points(record, names.TREE_MERGE_RATIO), 0),
    charts.Series("tokens, possible", possible, 1, dashed=True),
    charts.Series("FLOPs", _points(record, names.TREE_FLOP_BOUND), 2),
  ]


def _curves(record: RunRecord) -> str:
  def one(label: str, name: str, color: int = 0) -> charts.Series:
    return charts.Series(label, _points(record, name), color)

  rates = [one(label, name, i) for i, (label, name) in enumerate(_RATES)]
  mismatch = [
    one("max", names.MISMATCH_MAX, 1),
    one("mean", names.MISMATCH_MEAN, 0),
  ]
  packing = [
    one("achieved", names.TREE_ACHIEVED, 0),
    one("fill", names.TREE_FILL, 2),
    one("replay", names.TREE_REPLAY, 1),
  ]
  drawings = (
    (
      "Success: greedy, and sampled in training",
      charts.line_chart("success", _success(record), percent=True),
    ),
    (
      "Mean reward of the sampled episodes",
      charts.line_chart("reward", [one("reward", names.TRAIN_REWARD)]),
    ),
    (
      "Engine-trainer mismatch of log-probabilities, nats",
      charts.line_chart("mismatch", mismatch, log=True),
    ),
    (
      "Tokens a busy second",
      charts.line_chart("rates", rates, log=True),
    ),
    (
      "What merging saves, times: tokens and FLOPs",
      charts.line_chart("merging", _merging(record)),
    ),
    (
      "How much of it is achieved: FLOPs, packs filled, replays",
      charts.line_chart("packing", packing, percent=True),
    ),
    (
      "Share of tokens whose importance ratio is clipped",
      charts.line_chart("clipped", [one("clipped", names.RATIO_CLIPPED)]),
    ),
    (
      "Distance of what is trained from what is generated",
      charts.line_chart("drift", [one("largest", names.DRIFT)]),
    ),
    (
      "The window: groups from the head on",
      charts.line_chart("window", [one("W", names.QUEUE_WINDOW)]),
    ),
    (
      "Gradient norm before clipping",
      charts.line_chart("norm", [one("mean", names.TRAIN_GRAD_NORM)]),
    ),
    (
      "Alarms that hold",
      charts.line_chart("alarms", [one("alarms", names.WATCH_ALARMS)]),
    ),
    *_by_domain(record),
  )
  cards = "".join(
    f'<div class="card"><h3>{_e(title)}</h3>{drawing}</div>'
    for title, drawing in drawings
    if drawing is not None
  )
  return f'<div class="grid">{cards}</div>'


def _by_domain(record: RunRecord) -> list[tuple[str, str | None]]:
  """Success of each domain, where there are several: four to a drawing."""
  topic = f"{names.DOMAIN_SUCCESS}/"
  found = sorted(
    {name for row in record.metrics for name in row if name.startswith(topic)}
  )
  if len(found) < 2:
    return []
  series = [
    charts.Series(name.removeprefix(topic), _points(record, name), place % 4)
    for place, name in enumerate(found)
  ]
  return [
    (
      "Success sampled in training: "
      + ", ".join(one.label for one in series[first : first + 4]),
      charts.line_chart(
        f"domain{first}", series[first : first + 4], percent=True
      ),
    )
    for first in range(0, len(series), 4)
  ]


def _points(record: RunRecord, name: str) -> list[charts.Point]:
  return [
    (row["step"], _value(row[name])) for row in record.metrics if name in row
  ]


def _value(value: float | None) -> float:
  return math.nan if value is None else value


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
  if not examples:
    return ""
  cards = []
  for example in examples:
    sides = "".join(
      f"<div><h3>{label}</h3>{_transcript(example[key])}"
      f"{_reward(example[f'reward_{key}'])}</div>"
      for key, label in (("before", "Before"), ("after", "After"))
    )
    cards.append(
      '<div class="card example">'
      f'<div class="question">{_e(example["question"])}</div>'
      f'<div class="grid">{sides}</div></div>'
    )
  return "<h2>Example episodes</h2>" + "".join(cards)


def _transcript(messages: types.Messages) -> str:
  parts = []
  for message in messages:
    role = str(message.get("role", "?"))
    known = role if role in ("assistant", "tool") else "other"
    parts.append(
      f'<div class="message {known}"><div class="role">{_e(role)}</div>'
      f'<div class="text">{_e(_text(message))}</div></div>'
    )
  return "".join(parts)


def _text(message: types.Message) -> str:
  """The content of a message, with its tool calls one a line."""
  content = message.get("content")
  if isinstance(content, str):
    lines = [content]
  else:
    lines = [str(p.get("text", f"[{p.get('type')}]")) for p in content or ()]
  for call in message.get("tool_calls") or ():
    function = call.get("function", {})
    lines.append(f"{function.get('name')}({function.get('arguments')})")
  return "\n".join(lines)


def _reward(reward: float | Mapping[str, float]) -> str:
  parts = reward if isinstance(reward, Mapping) else {}
  total = sum(reward.values()) if isinstance(reward, Mapping) else reward
  listed = ", ".join(f"{_e(n)} {v:+.2f}" for n, v in parts.items())
  return (
    f'<p class="reward">Reward <b>{total:+.2f}</b>'
    f"{f' ({listed})' if listed else ''}</p>"
  )


def _facts(record: RunRecord) -> str:
  summary = record.summary
  facts = [
    ("Seed", summary.get("seed")),
    ("Steps", summary.get("steps")),
    ("Run time", _optional(summary.get("seconds"), _duration)),
    (
      "Peak memory",
      _optional(summary.get("peak_rss_gb"), lambda gb: f"{gb:.2f} GB"),
    ),
    (
      "Sample efficiency",
      _optional(
        summary.get(names.YIELD_EFFICIENCY),
        lambda gain: f"{gain:.3g} held-out success per 1,000 samples",
      ),
    ),
    (
      "Training yield J",
      _optional(
        summary.get(names.YIELD_J),
        lambda j: f"{j:.3g} (tokens/s x sample efficiency)",
      ),
    ),
    *(summary.get("versions") or {}).items(),
  ]
  rows = "".join(
    f"<tr><th>{_e(name)}</th><td>{_e(value)}</td></tr>"
    for name, value in facts
    if value is not None
  )
  config = json.dumps(record.config, indent=2, default=str)
  return (
    f'<div class="card"><table class="facts">{rows}</table></div>'
    '<details class="card"><summary>Resolved configuration</summary>'
    f"<pre>{_e(config)}</pre></details>"
  )


def _optional(value: float | None, show: Callable[[float], str]) -> str | None:
  return None if value is None else show(value)


def _percent(value: float | None) -> str:
  return "&ndash;" if value is None else f"{100 * value:.1f}%"


def _duration(seconds: float) -> str:
  minutes, second = divmod(round(seconds), 60)
  return f"{minutes} min {second} s" if minutes else f"{second} s"


def _e(value: Any) -> str:
  return html.escape(str(value))
