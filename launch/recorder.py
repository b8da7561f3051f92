"""Everything that a run tells: metrics, evaluations, the live display."""

from collections.abc import Mapping
import pathlib
import resource
import sys
import threading
import time
from typing import Any

from forge_jax.observe import display as display_lib
from forge_jax.observe import drafting, names, stability, throughput
from forge_jax.observe import metrics as metrics_lib
from forge_jax.pool import queue as queue_lib
from launch import build, journal
from launch import services as services_lib

_TICK_SECONDS = 0.5
_EVAL_NAMES = {
  "heldout": names.EVAL_HELDOUT,
  "phrasings": names.EVAL_PHRASINGS,
}


class Recorder:
  """A context manager around a run; continues what `workdir` holds."""

  def __init__(
    self,
    plan: build.Blueprint,
    workdir: pathlib.Path,
    step: int,
    started: float,
  ):
    """Opens the records, dropping what they hold after `step`.

    Args:
      plan: the run's.
      workdir: where the records are.
      step: trainer step that the run starts or continues from.
      started: monotonic time at which this process began, seconds.
    """
    self._started = started
    self.evaluations = journal.Evaluations(workdir / "evaluations.jsonl")
    self.evaluations.resume_from(step)
    self.metrics = metrics_lib.Metrics(_writers(plan, workdir))
    self.metrics.resume_from(step)
    self.training_yield = throughput.TrainingYield()
    self.stability = stability.Stability(plan.parts["stability"])
    self.display = display_lib.LiveDisplay(plan.name, plan.steps)
    self._before = 0.0  # seconds of the run in earlier processes
    for event in metrics_lib.read_jsonl(workdir / "metrics.jsonl"):
      self.training_yield.observe(event)
      self.stability.observe(event)
      self.display.observe(event)
      self._before = event.values.get(names.TIME_ELAPSED, self._before)
    self.metrics.subscribe(self.training_yield.observe)
    self.metrics.subscribe(self.stability.observe)
    self.metrics.subscribe(self.display.observe)
    self._meter = throughput.Meter()
    self._sources: tuple[services_lib.Services, queue_lib.GroupQueue] | None
    self._sources = None
    self._last: dict[str, float] = {}
    self._done = threading.Event()
    self._ticker = threading.Thread(target=self._tick, daemon=True)

  def __enter__(self):
    self.display.__enter__()
    return self

  def __exit__(self, *exception):
    self._done.set()
    if self._ticker.is_alive():
      self._ticker.join()
    self.metrics.close()
    self.display.__exit__(*exception)

  def elapsed(self) -> float:
    """Seconds that the run has taken, in this process and earlier ones."""
    return self._before + time.monotonic() - self._started

  def watch(
    self, services: services_lib.Services, queue: queue_lib.GroupQueue
  ) -> None:
    """Shows what changes between steps, from now on."""
    self._sources = services, queue
    self._ticker.start()

  def evaluate(
    self,
    services: services_lib.Services,
    step: int,
    split: str,
    count: int,
  ) -> None:
    """Evaluates, unless the records hold the same evaluation already."""
    if not count or self.evaluations.find(step, split, count):
      return
    self.display.note(f"step {step}: evaluating {count} {split} tasks")
    result = services.evaluate(split, count)
    self.evaluations.add(step, split, result)
    self.metrics.write(
      step,
      {
        _EVAL_NAMES[split]: result.success_rate,
        names.TIME_ELAPSED: self.elapsed(),
      },
    )

  def record_step(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes a trainer step's metrics with what the other parts did in it."""
    requested = int(values[names.TREE_REQUEST_TOKENS])
    add = self._meter.add
    add(throughput.Part.TRAINING, requested, values[names.TIME_TRAIN])
    add(throughput.Part.DATA, requested, values[names.TIME_DATA])
    services, queue = self._sources
    engine = services.engine.stats()
    add(
      throughput.Part.ROLLOUT,
      int(self._grown("sampled", engine["sampled_tokens"])),
      self._grown("busy", engine["busy_seconds"]),
    )
    add(
      throughput.Part.IO,
      int(self._grown("io_tokens", queue.io_tokens)),
      self._grown("io_seconds", queue.io_seconds),
    )
    self.metrics.write(
      step,
      {
        **values,
        **self._meter.end_step(),
        **self.training_yield.values(),
        **self.stability.values(),
        **self._live_values(),
        **drafting.values(
          {
            name: self._grown(name, engine.get(name, 0))
            for name in drafting.TOTALS
          }
        ),
        **queue.curated(),
        names.DRIFT: queue.meter.drift,
        names.DRIFT_LENGTH: queue.meter.by_feature["length"],
        names.DRIFT_DOMAIN: queue.meter.by_feature["domain"],
        names.DRIFT_SECONDS: queue.meter.by_feature["seconds"],
        names.DRIFT_SUCCESS: queue.meter.by_feature["success"],
        names.TIME_ELAPSED: self.elapsed(),
        names.MEMORY_RSS_GB: peak_rss_gb(),
      },
    )

  def finish(self, summary: Mapping[str, Any], report: pathlib.Path) -> None:
    """Prints the final table and where the report is."""
    self.display.__exit__(None, None, None)
    self.display.summarize(summary)
    print(f"report: {report}")

  def _grown(self, name: str, total: float) -> float:
    """How much a running total has grown since the last call."""
    grown = total - self._last.get(name, 0.0)
    self._last[name] = total
    return grown

  def _live_values(self) -> dict[str, float]:
    services, queue = self._sources
    figures = queue.stats()
    return {
      names.QUEUE_HEAD: figures["head"],
      names.QUEUE_IN_FLIGHT: figures["in_progress"],
      names.QUEUE_WAITING: figures["completed"],
      names.QUEUE_WINDOW: figures["window"],
      names.WEIGHTS_VERSION: services.engine.stats()["version"],
    }

  def _tick(self) -> None:
    while not self._done.wait(_TICK_SECONDS):
      self.display.update(self._live_values())


def peak_rss_gb() -> float:
  """Peak resident memory of this process, in 1e9 bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _writers(
  plan: build.Blueprint, workdir: pathlib.Path
) -> list[metrics_lib.Writer]:
  observe: metrics_lib.ObserveConfig = plan.parts["observe"]
  writers: list[metrics_lib.Writer] = [
    metrics_lib.JsonlWriter(workdir / "metrics.jsonl")
  ]
  if observe.tensorboard:
    writers.append(metrics_lib.TensorBoardWriter(workdir / "tensorboard"))
  if observe.wandb_project:
    writers.append(
      metrics_lib.WandbWriter(
        observe.wandb_project, workdir.name, workdir, plan.values
      )
    )
  return writers
