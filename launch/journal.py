"""What a run leaves behind for people: evaluations, summary, report."""

from collections.abc import Iterable, Mapping, Sequence
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

from forge_jax.observe import report
from forge_jax.rollout import evaluation

_PACKAGES = ("forge-jax", "jax", "jaxlib", "flax", "optax", "numpy", "openai")
_EXAMPLES = 3


class Evaluations:
  """The file evaluations.jsonl: one evaluation of one split a line."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.rows: list[dict[str, Any]] = []
    if path.exists():
      with path.open(encoding="utf-8") as file:
        # A line that a crash has torn has no newline.
        self.rows = [json.loads(s) for s in file if s.endswith("\n")]

  def resume_from(self, step: int) -> None:
    """Drops the evaluations of later steps, and a torn line."""
    self.rows = [row for row in self.rows if row["step"] <= step]
    write_atomically(
      self._path, "".join(json.dumps(row) + "\n" for row in self.rows)
    )

  def add(self, step: int, split: str, result: evaluation.EvalResult) -> None:
    """Appends an evaluation with its transcripts."""
    row = {
      "step": step,
      "split": split,
      "success": result.success_rate,
      "reward": result.mean_reward,
      "n": result.n,
      "failures": result.failures,
      "seconds": result.seconds,
      "episodes": [
        {
          "task": episode.task.id,
          "question": episode.task.payload.get("question", episode.task.id),
          "messages": list(episode.messages),
          "rewards": {r.name: r.value for r in episode.rewards},
        }
        for episode in result.episodes
      ],
    }
    self.rows.append(row)
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def find(self, step: int, split: str, n: int) -> dict[str, Any] | None:
    """The evaluation of a split at a step with n tasks; None: not done."""
    for row in self.rows:
      if (row["step"], row["split"], row["n"]) == (step, split, n):
        return row
    return None


def success(row: Mapping[str, Any] | None) -> float | None:
  """Success rate of an evaluation; None stays None."""
  return None if row is None else row["success"]


def examples(
  before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
  """Episodes of the same tasks before and after; first those that improved."""
  if before is None or after is None:
    return []
  pairs = list(zip(before["episodes"], after["episodes"], strict=True))
  total = lambda episode: sum(episode["rewards"].values())
  pairs.sort(key=lambda pair: total(pair[0]) - total(pair[1]))
  return [
    {
      "question": old["question"],
      "before": old["messages"],
      "after": new["messages"],
      "reward_before": old["rewards"],
      "reward_after": new["rewards"],
    }
    for old, new in pairs[:_EXAMPLES]
  ]


def curve(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Success by step and split, as the report wants it."""
  by_step: dict[int, dict[str, Any]] = {}
  for row in rows:
    at = by_step.setdefault(row["step"], {"step": row["step"]})
    at[row["split"]] = row["success"]
  return [by_step[step] for step in sorted(by_step)]


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide a run's numbers."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # run from a source tree without an installation
  return found


def write(
  folder: pathlib.Path,
  *,
  name: str,
  question: str,
  summary: Mapping[str, Any],
  metrics: Sequence[Any],
  evaluations: Evaluations,
  example_episodes: Sequence[Mapping[str, Any]],
  config: Mapping[str, Any],
) -> None:
  """Writes summary.json, report.html and curve.svg."""
  write_atomically(
    folder / "summary.json", json.dumps(summary, indent=2) + "\n"
  )
  record = report.RunRecord(
    name=name,
    question=question,
    summary=summary,
    metrics=[
      {"step": e.step, "time": e.time} | dict(e.values) for e in metrics
    ],
    evaluations=curve(evaluations.rows),
    examples=example_episodes,
    config=config,
  )
  report.write_report(folder, record)
  report.write_curve(folder / "curve.svg", record)


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file by a whole new one, or leaves it as it was."""
  partial = path.with_name(path.name + ".partial")
  with partial.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
