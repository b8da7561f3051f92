"""A whole run in one process: trains, evaluates, reports.

The trainer is on the main thread, the engine on its own, gateway, agents and
host on an asyncio loop. The working directory holds:

  config.json         the resolved configuration; a continued run must agree
  pool/               every completed group, durable
  checkpoints/        Orbax checkpoints
  metrics.jsonl       a line of metrics per step; tensorboard/ holds the same
  evaluations.jsonl   a line per evaluation, with its episodes
  summary.json, report.html, curve.svg    written when the run ends
"""

from collections.abc import Mapping
import contextlib
import json
import pathlib
import time
from typing import Any

from flax import nnx
import grain
import numpy as np

from forge_jax import errors, settings
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import huggingface
from forge_jax.observe import metrics as metrics_lib
from forge_jax.pool import compaction, dataset
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import store as store_lib
from forge_jax.pool import tickets as tickets_lib
from forge_jax.trainer import checkpoint, loop, preparation
from forge_jax.trainer import trainer as trainer_lib
from launch import build, compilations, journal
from launch import recorder as recorder_lib
from launch import services as services_lib

# What a continued run may change.
_MAY_DIFFER = (
  "steps:",
  "question:",
  "checkpoint.",
  "eval.",
  "gateway.",
  "observe.",
  "pool.",
)


class LocalRun:
  """One run in a working directory."""

  def __init__(self, values: Mapping[str, Any], workdir: str):
    """Checks the configuration; builds nothing yet.

    Raises:
      ConfigError: a key or value that cannot work, or a working directory
        that holds a run of another configuration.
    """
    self._started = time.monotonic()
    self._values = json.loads(json.dumps(values))
    self._plan = build.Blueprint(values)
    self._workdir = pathlib.Path(workdir).absolute()
    self._check_workdir()

  def train(self) -> bool:
    """Trains to the configured step and reports, or stops at Ctrl-C.

    Returns:
      Whether the run has ended; else the same configuration continues it.
    """
    plan = self._plan
    compilations.keep()
    with contextlib.ExitStack() as stack:
      stop = stack.enter_context(loop.StopSignal())
      decoder = plan.load_decoder()
      updater = plan.updater(decoder)
      trainer = plan.trainer(updater, decoder.config.vocab_size)
      del decoder  # its buffers now belong to the trainer's state
      # The model is good: only now is anything written.
      self._workdir.mkdir(parents=True, exist_ok=True)
      journal.write_atomically(
        self._workdir / "config.json",
        json.dumps(self._values, indent=2) + "\n",
      )
      store, tickets = self._open_pool(stack)
      checkpointer = checkpoint.Checkpointer(
        self._workdir, plan.parts["checkpoint"]
      )
      stack.callback(checkpointer.close)
      queue = plan.queue(store)
      batches = dataset.iterate(
        queue,
        trainer.config.groups_per_step,
        trainer.prepare,
        trainer.config.prepare_ahead,
      )
      stack.callback(batches.close)  # after the queue, for which it waits
      stack.callback(queue.close)
      loop.restore(trainer, batches, plan.side.mixture, checkpointer)
      services = plan.services(
        updater.decoder(trainer.state),
        trainer.step,
        tickets,
        imitate=bool(plan.imitate),
      )
      with recorder_lib.Recorder(
        plan, self._workdir, trainer.step, self._started
      ) as recorder:
        recorder.display.note("starting the engine")
        stack.enter_context(services)
        recorder.watch(services, queue)
        collector = compaction.Collector(store, plan.pool.retention)
        stack.callback(collector.close)
        self._run(
          trainer,
          batches,
          queue,
          checkpointer,
          stop,
          services,
          recorder,
          collector,
        )
        ended = trainer.step >= plan.steps
        if ended:
          self._finish(recorder, trainer.step)
        else:
          recorder.display.note(
            f"stopped at step {trainer.step} of {plan.steps} with a "
            "checkpoint; the same command continues"
          )
    return ended

  def _run(
    self,
    trainer: trainer_lib.Trainer,
    batches: grain.DatasetIterator[preparation.StepBatch],
    queue: queue_lib.GroupQueue,
    checkpointer: checkpoint.Checkpointer,
    stop: loop.StopSignal,
    services: services_lib.Services,
    recorder: recorder_lib.Recorder,
    collector: compaction.Collector,
  ) -> None:
    plan = self._plan

    def evaluate(step: int) -> None:
      with contextlib.suppress(loop.Interrupted), stop.interruptible():
        if step in (0, plan.steps):
          recorder.evaluate(services, step, "heldout", plan.eval.heldout)
          recorder.evaluate(services, step, "phrasings", plan.eval.phrasings)
        elif plan.eval.every and step % plan.eval.every == 0:
          recorder.evaluate(services, step, "heldout", plan.eval.during)
        recorder.metrics.flush()

    def record(step: int, values: Mapping[str, Any]) -> None:
      curriculum = plan.side.mixture.metrics()
      recorder.record_step(step, {**values, **curriculum})
      recorder.stability.check(checkpointer.steps())

    if trainer.step in (0, plan.steps):
      evaluate(trainer.step)
    if trainer.step < plan.steps and not stop.requested:
      services.start_host(queue)
      where = f"; rollout hosts use {services.gateway_url}"
      recorder.display.note(f"training{where if plan.pool.shared else ''}")
    loop.train(
      trainer,
      batches,
      queue,
      plan.side.mixture,
      checkpointer,
      stop,
      steps=plan.steps,
      seed=plan.seed,
      publish=services.engine.update_weights,
      evaluate=evaluate,
      record=record,
      flush=recorder.metrics.flush,
      retire=collector.collect,
    )

  def _open_pool(
    self, stack: contextlib.ExitStack
  ) -> tuple[store_lib.DataPool, tickets_lib.Tickets | None]:
    """The pool, and its tickets where hosts of other processes fill it."""
    store = stack.enter_context(self._plan.pool.open(self._workdir / "pool"))
    if not self._plan.pool.shared:
      return store, None
    tickets = self._plan.pool.tickets()
    stack.callback(tickets.close)
    tickets.take_over()
    return store, tickets

  def _finish(self, recorder: recorder_lib.Recorder, steps: int) -> None:
    """Writes the summary and the report, prints the table."""
    plan, evaluations = self._plan, recorder.evaluations
    recorder.metrics.flush()
    found = {
      f"{split}_{when}": evaluations.find(step, split, count)
      for split, count in (
        ("heldout", plan.eval.heldout),
        ("phrasings", plan.eval.phrasings),
      )
      for when, step in (("before", 0), ("after", steps))
    }
    summary = {key: journal.success(row) for key, row in found.items()} | {
      "steps": steps,
      "seed": plan.seed,
      "seconds": round(recorder.elapsed(), 1),
      "peak_rss_gb": round(recorder_lib.peak_rss_gb(), 3),
      "versions": journal.versions(),
    }
    summary |= dict(recorder.training_yield.values())
    journal.write(
      self._workdir,
      name=plan.name,
      question=plan.question,
      summary=summary,
      metrics=list(metrics_lib.read_jsonl(self._workdir / "metrics.jsonl")),
      evaluations=evaluations,
      example_episodes=journal.examples(
        found["heldout_before"], found["heldout_after"]
      ),
      config=self._values,
    )
    recorder.finish(summary, self._workdir / "report.html")

  def _check_workdir(self) -> None:
    path = self._workdir / "config.json"
    if not path.exists():
      return
    old = json.loads(path.read_text(encoding="utf-8"))
    differ = [
      line
      for line in settings.differences(old, self._values)
      if not line.startswith(_MAY_DIFFER)
    ]
    if differ:
      raise errors.ConfigError(
        f"{self._workdir} holds a run of another configuration "
        f"({'; '.join(differ)}); give a new --workdir"
      )


def evaluate_checkpoint(
  workdir: str, counts: Mapping[str, int | None], context: str | None = None
) -> dict[str, float | int]:
  """Evaluates the newest checkpoint of a run as the run itself did.

  Args:
    workdir: the run's.
    counts: tasks by split, None for the run's own number, 0 for none.
    context: strategy of the context, None for the run's own.

  Returns:
    The checkpoint's step and the success rate, 0..1, by split.

  Raises:
    CheckpointError: the folder holds no run or no checkpoint.
    ConfigError: there is no such strategy.
  """
  compilations.keep()
  plan, decoder, step = _load_checkpoint(workdir)
  if context is not None:
    plan.side.evaluated = plan.side.lineup.with_strategy(context)
  result: dict[str, float | int] = {"step": step}
  with plan.services(decoder, step) as services:
    for split, count in counts.items():
      count = getattr(plan.eval, split) if count is None else count
      if count:
        result[split] = services.evaluate(split, count).success_rate
  return result


def export_checkpoint(workdir: str, folder: str) -> int:
  """Writes the newest checkpoint as a Hugging Face folder; returns its step.

  The folder must not exist; it gets safetensors, config.json and tokenizer.

  Raises:
    CheckpointError: there is no checkpoint, or the folder cannot be written.
  """
  plan, decoder, step = _load_checkpoint(workdir)
  params = decoder_lib.flatten(nnx.state(decoder))
  huggingface.write_huggingface(
    pathlib.Path(folder),
    decoder.config,
    {name: np.asarray(value) for name, value in params.items()},
  )
  plan.load_tokenizer().save_pretrained(folder)
  return step


def _load_checkpoint(
  workdir: str,
) -> tuple[build.Blueprint, decoder_lib.Decoder, int]:
  """The plan of a run, and its newest weights with their step."""
  path = pathlib.Path(workdir).absolute() / "config.json"
  if not path.exists():
    raise errors.CheckpointError(f"{path} does not exist: no run is there")
  plan = build.Blueprint(json.loads(path.read_text(encoding="utf-8")))
  checkpointer = checkpoint.Checkpointer(path.parent, plan.parts["checkpoint"])
  try:
    decoder, host = checkpointer.restore_decoder(plan.load_decoder())
  finally:
    checkpointer.close()
  return plan, decoder, host["step"]
