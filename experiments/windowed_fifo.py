r"""What does the window cost in throughput, and what does it keep in order?

Question: with durations from seconds to hours, how do FIFO (W = 1), windows of
0.1 N, 0.3 N and 0.5 N, greedy (W = N) and a window set by the drift compare in
throughput, in the trainer's idle time, in lag, and in how far what is trained
strays from what was asked for?

Command:  python -m experiments.windowed_fifo            # a table a workload
          python -m experiments.windowed_fifo --json     # one line a policy
          python -m experiments.windowed_fifo --picture     # the pictures
          python -m experiments.windowed_fifo --tasks=800000 \
            --policies="0.3 N,greedy"                    # the long run
Hardware: one CPU core, about a minute a workload.
Result:   docs/windowed_fifo.md.

The scheduler is the real one (`pool/windowed_fifo.py`); only clocks are
simulated. An engine runs at most `slots` groups at a time, in the order of
submission; a trainer takes `STEP` groups a step and claims the next batch
while it computes, as `GroupQueue` does.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import heapq
import json
import random
import time

from absl import app, flags
import numpy as np

from experiments.figures import drawing
from experiments.figures import windowed_fifo as pictures
from forge_jax.pool import drift, windowed_fifo
from forge_jax.pool import window as window_lib

_JSON = flags.DEFINE_bool("json", False, "one line of JSON a policy")
_WORKLOAD = flags.DEFINE_string("workload", "", "one of them; all by default")
_TASKS = flags.DEFINE_integer("tasks", 100_000, "groups to train")
_POLICIES = flags.DEFINE_list(
  "policies", "", "some of them, greedy among them; all by default"
)

IN_FLIGHT = 8192  # N
STEP = 512  # P
SAMPLE = 2048  # groups in a row whose distribution is looked at
WINDOWS: Mapping[str, int | float] = {
  "fifo": 1,
  "0.1 N": 0.1,
  "0.3 N": 0.3,
  "0.5 N": 0.5,
  "greedy": 1.0,
  "adaptive": 1.0,  # where DRIFT lets it
}
DRIFT = drift.DriftConfig(recent=1024, reference=IN_FLIGHT, adapt=True)


@dataclasses.dataclass(frozen=True)
class Workload:
  """How long groups take, and how fast they are worked on."""

  about: str
  slots: int  # groups that the engine runs at a time
  deadline: float  # seconds after which a group ends as it is
  headroom: float  # the trainer's capacity by that of an engine never idle
  medians: tuple[float, ...] = (120.0,)  # seconds, of each domain
  shares: tuple[float, ...] = (1.0,)  # of each domain
  sigma: float = 1.5  # of the logarithm of a domain's durations

  def durations(self, count: int, seed: int) -> np.ndarray:
    """Seconds that each task takes: log-normal, cut at the deadline."""
    rng = np.random.default_rng(seed)
    domain = rng.choice(len(self.shares), count, p=self.shares)
    median = np.array(self.medians)[domain]
    return np.minimum(
      median * np.exp(self.sigma * rng.standard_normal(count)), self.deadline
    )


WORKLOADS = {
  "stragglers": Workload(
    "stragglers outlast the N groups that may be begun beside them",
    slots=1024,
    deadline=4 * 3600,
    headroom=1.2,
  ),
  "domains": Workload(
    "one task in four is of a domain twenty times as slow",
    slots=1024,
    deadline=1.5 * 3600,
    headroom=1.2,
    medians=(60.0, 1200.0),
    shares=(0.75, 0.25),
    sigma=0.6,
  ),
  "engine": Workload(
    "N is large enough for any straggler: the engine never waits",
    slots=256,
    deadline=2 * 3600,
    headroom=1.0,
  ),
}


@dataclasses.dataclass(frozen=True)
class Trace:
  """What happened. Arrays are by place in the order of training."""

  tasks: np.ndarray  # int, index of the group
  lag: np.ndarray  # int, groups consumed between its submission and its own
  steady: float  # groups a second from the first N trained to the end
  seconds: float  # until the last step's end
  idle: float  # share of them in which the trainer waited, 0..1
  engine_idle: float  # share of slots and seconds without a group, 0..1
  width: np.ndarray  # int, W after each step's batch was claimed


class Simulation:
  """A scheduler between an engine and a trainer, on a simulated clock."""

  def __init__(
    self,
    config: window_lib.WindowConfig,
    durations: Sequence[float],
    slots: int,
    step_seconds: float,
    meter: drift.DriftMeter | None = None,
  ):
    self._meter = meter
    self._fifo = windowed_fifo.WindowedFifo(config)
    self._batch = config.groups_per_step
    self._durations = durations
    self._step_seconds = step_seconds
    self._now = 0.0
    self._free = slots
    self._queued: collections.deque[int] = collections.deque()  # without slot
    self._running: list[tuple[float, int]] = []  # heap of (end, index)
    self._begun: dict[int, int] = {}  # index -> groups consumed before
    self._gathered: list[int] = []  # claimed for the next step
    self._step_end: float | None = None  # None: the trainer waits
    self._waits_since = 0.0
    self._idle = self._engine_idle = 0.0
    self._steps = 0
    self._slots = slots
    self._trained: list[int] = []
    self._lag: list[int] = []
    self._width: list[int] = []

  def run(self, tasks: int) -> Trace:
    """Runs until the step that trains the last of `tasks` groups has ended."""
    steps = tasks // self._batch
    warm, warm_at = min(steps - 1, IN_FLIGHT // self._batch), 0.0
    self._settle()
    while self._steps < steps:
      end = self._step_end
      if end is not None and (not self._running or end <= self._running[0][0]):
        self._advance(end)
        self._steps += 1
        warm_at = end if self._steps == warm else warm_at
        self._step_end, self._waits_since = None, end
      else:
        end, index = heapq.heappop(self._running)
        self._advance(end)
        self._free += 1
        self._fifo.complete(index)
        if self._meter is not None:
          self._meter.generate(self._features(index))
      self._settle()
    size = steps * self._batch
    return Trace(
      np.array(self._trained[:size]),
      np.array(self._lag[:size]),
      (steps - warm) * self._batch / (self._now - warm_at),
      self._now,
      self._idle / self._now,
      self._engine_idle / self._now / self._slots,
      np.array(self._width[:steps]),
    )

  def _advance(self, now: float) -> None:
    self._engine_idle += (now - self._now) * self._free
    self._now = now

  def _settle(self) -> None:
    """Submits, starts and claims until there is nothing more to do."""
    fifo = self._fifo
    while True:
      for _ in range(fifo.admissible(self._steps)):
        index = fifo.submit(self._steps).index
        self._begun[index] = len(self._lag)
        self._queued.append(index)
      while self._free and self._queued:
        index = self._queued.popleft()
        end = self._now + self._durations[index]
        heapq.heappush(self._running, (end, index))
        self._free -= 1
      count = min(fifo.available(), self._batch - len(self._gathered))
      for ticket in fifo.take(count, self._steps)[0]:
        self._lag.append(len(self._lag) - self._begun.pop(ticket.index))
        self._gathered.append(ticket.index)
      if self._step_end is None and len(self._gathered) == self._batch:
        self._idle += self._now - self._waits_since
        self._trained += self._gathered
        self._adapt()
        self._gathered = []
        self._step_end = self._now + self._step_seconds
      elif not count:
        return

  def _adapt(self) -> None:
    """Sets the window by the drift, as `GroupQueue` does."""
    if self._meter is not None:
      self._meter.train([self._features(index) for index in self._gathered])
      self._fifo.resize(self._meter.width(self._fifo.config.capacity))
    self._width.append(self._fifo.width)

  def _features(self, index: int) -> drift.Features:
    seconds = self._durations[index]
    return drift.Features(seconds, "", seconds, 1.0)


def simulate(
  workload: Workload, policy: str, tasks: int, seed: int = 0
) -> tuple[Trace, np.ndarray]:
  """One policy on one workload; the trace and all tasks' durations."""
  config = window_lib.WindowConfig(
    in_flight=IN_FLIGHT,
    window=WINDOWS[policy],
    max_lag=None,
    groups_per_step=STEP,
  )
  durations = workload.durations(tasks + 2 * IN_FLIGHT, seed)
  capacity = workload.slots / durations.mean()  # groups a second, never idle
  simulation = Simulation(
    config,
    durations.tolist(),
    workload.slots,
    STEP / (capacity * workload.headroom),
    drift.DriftMeter(DRIFT) if policy == "adaptive" else None,
  )
  return simulation.run(tasks), durations


@dataclasses.dataclass(frozen=True)
class Figures:
  """What a trace amounts to."""

  throughput: float  # groups trained a second after the first N
  whole: float  # the same with the run's start, which favours greedy once
  idle: float  # share of the time in which the trainer waits
  engine_idle: float  # share of the slots' time without a group
  max_lag: int  # groups consumed between a group's submission and its own
  drift: float  # mean of `drift_by_step`
  excess: float  # of it, what is beyond chance, 0 at least
  gradient_noise: float  # variance of a step's mean, by that of a random step
  drift_by_step: np.ndarray  # of the last SAMPLE groups from all tasks, 0..1


def measure(trace: Trace, durations: np.ndarray) -> Figures:
  """Figures of a trace.

  The proxy for gradient noise takes a task's standardised log-duration for
  its gradient: the mean over a step's groups has the variance 1 / STEP when
  they are drawn at random; the figure is how many times that it has here.
  """
  everything = np.log(durations)
  trained = everything[trace.tasks]
  size = min(SAMPLE, len(trained))
  by_step = np.array(
    [
      drift.distance(trained[end - size : end], everything)
      for end in range(size, len(trained) + 1, STEP)
    ]
  )
  chance = drift.noise(size, len(everything))
  signal = (trained - everything.mean()) / everything.std()
  means = signal.reshape(-1, STEP).mean(1)
  return Figures(
    throughput=trace.steady,
    whole=len(trained) / trace.seconds,
    idle=trace.idle,
    engine_idle=trace.engine_idle,
    max_lag=int(trace.lag.max()),
    drift=float(by_step.mean()),
    excess=max(0.0, float(by_step.mean()) - chance),
    gradient_noise=float(STEP * np.mean(means**2)),
    drift_by_step=by_step,
  )


def decision_rate(items: int = 100_000) -> float:
  """Decisions (submit, complete, take) a second of CPU time, N = 8192."""
  config = window_lib.WindowConfig(
    in_flight=IN_FLIGHT, window=0.3, max_lag=None, groups_per_step=STEP
  )
  fifo, rng = windowed_fifo.WindowedFifo(config), random.Random(0)
  running: list[int] = []
  consumed, decisions, spent = 0, 0, 0.0
  while consumed < items:
    rng.shuffle(running)  # outside of what is timed
    started = time.process_time()
    for _ in range(fifo.admissible(0)):
      running.append(fifo.submit(0).index)
      decisions += 1
    for index in running[: len(running) // 2 + 1]:
      fifo.complete(index)
    del running[: len(running) // 2 + 1]
    taken, _ = fifo.take(fifo.available())
    spent += time.process_time() - started
    consumed += len(taken)
  return (decisions + fifo.completed + 2 * consumed) / spent


def table(figures: Mapping[str, Figures]) -> str:
  """A workload's figures as Markdown, beside those of greedy."""
  greedy = figures["greedy"]
  lines = [
    "| W | groups/s | of greedy's | of the whole run | trainer idle "
    "| engine idle | largest lag | drift | of greedy's | beyond chance "
    "| gradient noise |",
    "| --- " * 11 + "|",
  ]
  for name, f in figures.items():
    beyond = f"{f.excess / greedy.excess:.0%}" if greedy.excess > 0.005 else "-"
    cells = (
      f"{f.throughput:.3f}",
      f"{f.throughput / greedy.throughput:.1%}",
      f"{f.whole / greedy.whole:.1%}",
      f"{f.idle:.0%}",
      f"{f.engine_idle:.0%}",
      f"{f.max_lag:,}",
      f"{f.drift:.3f}",
      f"{f.drift / greedy.drift:.0%}",
      beyond,
      f"{f.gradient_noise:.1f}",
    )
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  for name in [_WORKLOAD.value] if _WORKLOAD.value else WORKLOADS:
    workload, started = WORKLOADS[name], time.perf_counter()
    labels = _POLICIES.value or WINDOWS
    runs = {label: simulate(workload, label, _TASKS.value) for label in labels}
    figures = {label: measure(*run) for label, run in runs.items()}
    for label, found in figures.items() if _JSON.value else ():
      keys = ("throughput", "idle", "max_lag", "drift")
      values = {key: getattr(found, key) for key in keys}
      print(json.dumps({"workload": name, "policy": label} | values))
    if not _JSON.value:
      seconds = time.perf_counter() - started
      print(f"\n{name}: {workload.about} ({seconds:.0f} s)\n\n{table(figures)}")
    if drawing.PICTURE.value:
      picture = pictures.simulated(
        {k: f.drift_by_step for k, f in figures.items()},
        {k: trace.lag for k, (trace, _) in runs.items()},
        STEP,
      )
      drawing.write(f"windowed_fifo_{name}", picture)
      adaptive = pictures.adapted(
        runs["adaptive"][0].width / IN_FLIGHT, figures["adaptive"].drift_by_step
      )
      drawing.write(f"windowed_fifo_{name}_adaptive", adaptive)
  if not _JSON.value:
    print(f"\n{decision_rate():,.0f} decisions a second")


if __name__ == "__main__":
  app.run(main)
