"""A run that is killed at random instants, again and again.

Each life opens the pool, restores its checkpoint, rolls out and trains: the
real pool, window and claims; a step is a line in the history instead of an
update. A life says on a pipe what it has done, and is killed. The parent holds
what was said against what is on the disk:

  lost           groups whose acknowledgement was said and that are not stored
  torn           stored groups that do not read back as they were made
  trained_twice  groups that the surviving history trains more than once
  skipped        groups that it does not train

    python -m experiments.benchmarks.pool_crash --rounds=200 --folder=.

A life is a fork of a process that has imported everything and nothing else.
"""

import argparse
import asyncio
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from typing import NoReturn

import numpy as np

from forge_jax import errors, types
from forge_jax.pool import codec, store, window
from forge_jax.pool import queue as queue_lib

TOTAL, BATCH = 160, 4  # groups of a run, groups of a step
_CONFIG = store.PoolConfig(segment_bytes=300_000)
_WINDOW = window.WindowConfig(
  in_flight=24, window=10, max_lag=2, groups_per_step=BATCH, total=TOTAL
)
_ACK = re.compile(r"write\(1<.*\"ack \d+")


def run(path: pathlib.Path, rounds: int) -> dict[str, int]:
  """Plays `Rounds` in a process of its own; returns its counts."""
  return _call("--rounds", str(rounds), "--folder", str(path))


def prove_order(path: pathlib.Path, appends: int = 50) -> dict[str, int | None]:
  """Counts acknowledgements that precede one of their two syncs.

  strace shows the calls in the order of the kernel. Without strace, or where
  it may not trace, the counts are 0 and None.
  """
  found = {"acks_traced": 0, "unsynced_acks": None}
  if shutil.which("strace") is None:
    return found
  trace = path / "trace.txt"
  calls = "trace=write,writev,pwrite64,fsync,fdatasync"
  tracer = ["strace", "-f", "-y", "-e", calls, "-o", trace]
  arguments = ["--append", str(appends), "--folder", str(path)]
  done = subprocess.run(
    [*tracer, sys.executable, "-m", __spec__.name, *arguments],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    return found
  return judge(trace.read_text(encoding="utf-8", errors="replace"))


def judge(trace: str) -> dict[str, int | None]:
  """Reads a trace of single-threaded appends."""
  acks = unsynced = 0
  data = row = "clean"
  opened = False
  for line in trace.splitlines():
    opened = opened or '"open' in line
    if not opened:
      continue  # the tables are made
    if _ACK.search(line):
      acks += 1
      unsynced += (data, row) != ("synced", "synced")
      data = row = "clean"
    elif "segment-" in line:
      data = _next(data, line)
    elif "index.sqlite-wal" in line:
      row = _next(row, line)
      # A row that is committed before its data is durable is no better.
      if row == "written" and data != "synced":
        unsynced += 1
  return {"acks_traced": acks, "unsynced_acks": unsynced}


def _next(state: str, line: str) -> str:
  if "sync(" in line and line.rstrip().endswith("= 0"):
    return "synced"
  return "written" if "write" in line else state


def _call(*arguments: str) -> dict[str, int]:
  done = subprocess.run(
    [sys.executable, "-m", __spec__.name, *arguments],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def group(index: int) -> types.Group:
  """A group of 60 kB that its index decides."""
  rng = np.random.default_rng(index)
  task = types.Task(f"crash/train/{index}", "crash", index, {})
  count = 4000
  completion = types.Completion(
    id="0",
    prompt_ids=rng.integers(0, 1000, count, dtype=np.int32),
    response_ids=rng.integers(0, 1000, count, dtype=np.int32),
    logprobs=-rng.random(count, np.float32),
    versions=np.zeros(count, np.int32),
    stop_reason=types.StopReason.STOP,
  )
  episode = types.Episode(
    id=f"{index}-0",
    task=task,
    member=0,
    seed=index,
    status=types.EpisodeStatus.COMPLETED,
    completions=(completion,),
    rewards=(),
  )
  return types.Group(index, task, (episode,), number=index)


class Rounds:
  """Lives of runs, one after the other, and what became of their groups."""

  def __init__(self, folder: pathlib.Path, seed: int = 0):
    self._folder = folder
    self._rng = random.Random(seed)
    self.counts = dict.fromkeys(
      ("kill_rounds", "lost", "torn", "trained_twice", "skipped"), 0
    )
    self._begin()

  def play(self, rounds: int) -> dict[str, int]:
    """Kills that many lives; the last run is led to its end."""
    while self.counts["kill_rounds"] < rounds:
      killed = self._live(self._rng.uniform(0.0, 0.3))
      self.counts["kill_rounds"] += killed
      if not killed:
        self._finish()
    while self._live(None):
      pass
    self._finish()
    return self.counts

  def _begin(self) -> None:
    shutil.rmtree(self._folder, ignore_errors=True)
    self._folder.mkdir(parents=True)
    self._acknowledged: set[int] = set()
    self._history: list[list[int]] = []

  def _live(self, seconds: float | None) -> bool:
    """One life; returns whether it was killed before its end."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
      os.close(source)
      _life(self._folder, sink)
    os.close(sink)
    with os.fdopen(source, encoding="ascii") as said:
      if said.readline() != "open\n":
        raise RuntimeError("a life could not begin; see its error above")
      if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        timer.start()
      lines = said.read().split("\n")[:-1]  # a line cut off says nothing
    if seconds is not None:
      timer.cancel()
      timer.join()
    _, status = os.waitpid(child, 0)
    for line in lines:
      self._hear(line)
    self._look()
    if status not in (0, signal.SIGKILL):
      raise RuntimeError(f"a life ended with status {status}")
    return status != 0

  def _hear(self, line: str) -> None:
    what, *numbers = line.split()
    values = list(map(int, numbers))
    if what == "ack":
      self._acknowledged.add(values[0])
    elif what == "restored":
      self._history = self._history[: values[0]]
    elif what == "step":
      self._history.append(values)

  def _look(self) -> None:
    with store.DataPool.open(self._folder / "pool", readonly=True) as pool:
      stored = set(pool.indices())
    missing = self._acknowledged - stored
    self.counts["lost"] += len(missing)
    self._acknowledged -= missing

  def _finish(self) -> None:
    with store.DataPool.open(self._folder / "pool", readonly=True) as pool:
      for index in pool.indices():
        same = codec.encode(pool.get(index)) == codec.encode(group(index))
        self.counts["torn"] += not same
    trained = [index for step in self._history for index in step]
    self.counts["trained_twice"] += len(trained) - len(set(trained))
    self.counts["skipped"] += len(set(range(TOTAL)) - set(trained))
    self._begin()


def _life(folder: pathlib.Path, sink: int) -> NoReturn:
  """Runs in the child: rolls out and trains until the end."""
  try:
    with store.DataPool.open(folder / "pool", _CONFIG) as pool:
      _say(sink, "open")
      queue = queue_lib.GroupQueue(pool, _WINDOW)
      checkpoint = folder / "checkpoint.json"
      if checkpoint.exists():
        queue.restore(json.loads(checkpoint.read_text()))
      steps = queue.state()["trained_steps"]
      _say(sink, f"restored {steps}")
      host = threading.Thread(
        target=asyncio.run, args=(_roll_out(queue, sink),), daemon=True
      )
      host.start()
      for step in range(steps + 1, TOTAL // BATCH + 1):
        batch = queue.take(BATCH)
        _say(sink, f"step {' '.join(str(g.index) for g in batch)}")
        queue.commit(step)
        if step % 3 == 0 or step == TOTAL // BATCH:
          _save(checkpoint, queue.state())
      queue.close()
      host.join()
    os._exit(0)
  except BaseException as error:
    print(f"pool_crash: {error!r}", file=sys.stderr, flush=True)
    os._exit(1)


async def _roll_out(queue: queue_lib.GroupQueue, sink: int) -> None:
  rng = random.Random()

  async def serve(index: int) -> None:
    await asyncio.sleep(rng.expovariate(200.0))
    await asyncio.to_thread(queue.complete, group(index))
    _say(sink, f"ack {index}")

  try:
    async with asyncio.TaskGroup() as groups:
      while True:
        ticket = await queue.admit()
        groups.create_task(serve(ticket.index))
  except* errors.PoolError:
    pass  # the queue is closed: the run is over


def _say(sink: int, line: str) -> None:
  os.write(sink, f"{line}\n".encode())


def _save(path: pathlib.Path, state: object) -> None:
  partial = path.with_suffix(".partial")
  with partial.open("w") as file:
    json.dump(state, file)
    file.flush()
    os.fsync(file.fileno())
  partial.rename(path)


def _append(folder: pathlib.Path, count: int) -> None:
  """Appends on one thread and says so, for strace."""
  with store.DataPool.open(folder / "traced", _CONFIG) as pool:
    os.write(1, b"open\n")
    for index in range(count):
      pool.append(group(index))
      os.write(1, f"ack {index}\n".encode())


def main() -> None:
  """What the other processes of this benchmark run."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rounds", type=int, default=0)
  parser.add_argument("--append", type=int, default=0)
  parser.add_argument("--folder", default=".")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=options.folder) as folder:
    path = pathlib.Path(folder)
    if options.append:
      _append(path, options.append)
    if options.rounds:
      print(json.dumps(Rounds(path / "run").play(options.rounds)))


if __name__ == "__main__":
  main()
