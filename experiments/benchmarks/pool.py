"""How fast the middle of the system is, and that it loses nothing.

    python -m experiments.benchmarks.pool [--quick] [--folder=.]

Measures, in a folder of the file system given:

  append      durable appends of 1.8 MB episodes (200k tokens) by eight
              threads, beside the disk's own rate for synced writes of that
              size, before and after; also by a second of processor time
  decisions   the scheduler's submissions, completions and takes a second
  rebuild     scheduler state of 100,000 stored groups after a clean close,
              and after a crash, which makes the index again
  middleware  completions a second from the gateway's session records through
              pool, window and claims to packed batches, in one process
  kill -9     rounds at random instants; what was lost, torn, trained twice or
              skipped (`pool_crash.py`)
  order       with strace: no acknowledgement precedes its two syncs
  damage      random flips and truncations over pool and checkpoints, and how
              many were noticed with the newest good state restored and what
              was lost named (`pool_damage.py`)

Hardware: any; expected on two cores with a disk that syncs 400 MB/s: append
above 300 MB/s, decisions above 300k/s, rebuild below 5 s, nothing lost. The
last line is JSON; `--quick` takes less than 50 s.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

import numpy as np

from experiments.benchmarks import pool_crash, pool_damage, pool_middleware
from forge_jax import types
from forge_jax.gateway import wire
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import records, segment, store, window, windowed_fifo

TURNS, OBSERVATION, RESPONSE = 50, 1500, 2500  # 200k tokens, 1.8 MB
WRITERS = 8  # threads: a host completes as many groups at a time


def main() -> None:
  """Runs every part and prints a line for each."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--quick", action="store_true", help="less than 50 s")
  parser.add_argument("--folder", default=".", help="on the disk to measure")
  options = parser.parse_args()
  quick = options.quick
  with tempfile.TemporaryDirectory(dir=options.folder) as folder:
    path = pathlib.Path(folder)
    result = {}
    for part in (
      lambda: appends(path, seconds=3 if quick else 10),
      lambda: {"decisions_s": decisions(200_000 if quick else 1_000_000)},
      lambda: rebuild(path, 20_000 if quick else 100_000),
      lambda: pool_middleware.run(path, 100 if quick else 800),
      lambda: pool_crash.run(path, 10 if quick else 200),
      lambda: pool_crash.prove_order(path),
      lambda: pool_damage.run(path, 20 if quick else 200),
    ):
      started = time.perf_counter()
      found = part()
      text = ", ".join(f"{name} {_short(v)}" for name, v in found.items())
      print(f"{text}  ({time.perf_counter() - started:.1f} s)", flush=True)
      result |= found
  print(json.dumps(result))
  broken = ("lost", "torn", "trained_twice", "skipped", "unsynced_acks")
  unnoticed = result["corruptions"] - result["noticed"]
  if unnoticed or any(result[name] for name in broken):
    sys.exit("the pool has lost something")


def _short(value: object) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def episode(seed: int) -> types.Group:
  """A group of one episode whose history grows over `TURNS` requests."""
  rng = np.random.default_rng(seed)
  draw = lambda count: rng.integers(0, 200_000, count, dtype=np.int32)
  task = types.Task(f"bench/train/{seed}", "bench", seed, {})
  completions, history, parent = [], np.empty(0, np.int32), None
  for turn in range(TURNS):
    prompt = np.concatenate([history, draw(OBSERVATION)])
    response = draw(RESPONSE)
    completions.append(
      types.Completion(
        id=str(turn),
        prompt_ids=prompt,
        response_ids=response,
        logprobs=-rng.random(RESPONSE, np.float32),
        versions=np.full(RESPONSE, turn, np.int32),
        stop_reason=types.StopReason.STOP,
        parent=parent,
      )
    )
    history, parent = np.concatenate([prompt, response]), str(turn)
  made = types.Episode(
    id=f"{seed}-0",
    task=task,
    member=0,
    seed=seed,
    status=types.EpisodeStatus.COMPLETED,
    # As a host has them from the gateway.
    completions=wire.completions_from_json(
      wire.completions_to_json(completions)
    ),
    rewards=(types.Reward("score", types.Component.PERF, 1.0),),
  )
  return types.Group(seed, task, (made,))


def appends(path: pathlib.Path, seconds: float) -> dict[str, float]:
  """MB/s of durable appends on threads, and of plain synced writes."""
  episodes = [episode(seed) for seed in range(6)]
  size = len(records.group_record(episodes[0]).body)
  before = _sync_rate(path / "plain", size, seconds / 4)
  with store.DataPool.open(path / "append") as pool:
    pool.append(episodes[0])
    counts, end = [0] * WRITERS, time.perf_counter() + seconds

    def work(worker: int) -> None:
      while time.perf_counter() < end:
        number = 1 + worker + WRITERS * counts[worker]
        group = episodes[number % len(episodes)]
        pool.append(types.Group(number, group.task, group.episodes))
        counts[worker] += 1

    spent = time.process_time()
    elapsed = _together(work, WRITERS)
    spent = time.process_time() - spent
    stored = sum(info.bytes for info in pool.infos(1))
  after = _sync_rate(path / "plain", size, seconds / 4)
  return {
    "append_mb_s": stored / elapsed / 1e6,
    "append_mb_cpu_s": stored / spent / 1e6,
    "disk_sync_mb_s": (before + after) / 2,
    "episode_mb": size / 1e6,
  }


def _sync_rate(path: pathlib.Path, size: int, seconds: float) -> float:
  """MB/s of writing `size` bytes and syncing them, again and again."""
  data, count = os.urandom(size), 0
  writer = segment.SegmentWriter(path)
  started = time.perf_counter()
  while (elapsed := time.perf_counter() - started) < seconds:
    writer.write([segment.Record(0, count, b"", data)])
    writer.sync()
    count += 1
  writer.close()
  path.unlink()
  return count * size / elapsed / 1e6


def _together(work: Callable[[int], None], count: int) -> float:
  """Runs `work` on threads; returns the seconds until all are done."""
  threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
  started = time.perf_counter()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return time.perf_counter() - started


def decisions(count: int) -> float:
  """Submissions, completions and takes a second, N = 8192 and W = 0.3 N."""
  config = window.WindowConfig(
    in_flight=8192, window=2457, max_lag=None, groups_per_step=64
  )
  scheduler = windowed_fifo.WindowedFifo(config)
  rng = np.random.default_rng(0)
  running = [scheduler.submit().index for _ in range(8192)]
  made, started = 8192, time.perf_counter()
  while made < count:
    place = int(rng.random() * len(running))
    running[place], running[-1] = running[-1], running[place]
    scheduler.complete(running.pop())
    ready = scheduler.available()
    if ready:
      scheduler.take(ready)
    fresh = scheduler.admissible(0)
    running += [scheduler.submit().index for _ in range(fresh)]
    made += 1 + ready + fresh
  return made / (time.perf_counter() - started)


def rebuild(path: pathlib.Path, count: int) -> dict[str, float]:
  """Seconds to a scheduler's state, with the index and without."""
  folder = path / "rebuild"
  task = types.Task("bench/train/0", "bench", 0, {})
  ids = np.zeros(4, np.int32)
  completion = types.Completion(
    "0", ids, ids, np.zeros(4, np.float32), ids, types.StopReason.STOP
  )
  one = types.Episode(
    "0", task, 0, 0, types.EpisodeStatus.COMPLETED, (completion,), ()
  )
  record = records.group_record(types.Group(0, task, (one,)))
  head = json.loads(record.head)
  with store.DataPool.open(folder, store.PoolConfig(2**24)) as pool:
    log = pool.writing("")
    for start in range(0, count, 5000):
      log.move(  # all share one body, which a rebuild does not read
        segment.Record(
          records.GROUP,
          index,
          json.dumps(head | {"index": index, "number": index}).encode(),
          record.body,
        )
        for index in range(start, min(start + 5000, count))
      )
  times = []
  for clean in (True, False):
    if not clean:
      (folder / "index.clean").unlink()
    started = time.perf_counter()
    with store.DataPool.open(folder) as pool:
      config = window.WindowConfig(in_flight=count, window=count, max_lag=None)
      queue = queue_lib.GroupQueue(pool, config)
      times.append(time.perf_counter() - started)
      assert queue.stats()["available"] == count
  return {
    "rebuild_items": count,
    "rebuild_s": times[0],
    "rebuild_index_s": times[1],
  }


if __name__ == "__main__":
  main()
