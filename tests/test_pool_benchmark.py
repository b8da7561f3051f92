"""The pool's benchmark without its timings: kills, the order of syncs, damage."""

import random
import shutil
import subprocess

import pytest

from experiments.benchmarks import (
  pool,
  pool_crash,
  pool_damage,
  pool_middleware,
)
from forge_jax.pool import records


def test_twenty_kills_lose_tear_repeat_and_skip_nothing(tmp_path):
  assert pool_crash.run(tmp_path, rounds=20) == {
    "kill_rounds": 20,
    "lost": 0,
    "torn": 0,
    "trained_twice": 0,
    "skipped": 0,
  }


def test_what_a_crash_does_wrong_is_counted(tmp_path):
  """The judge of the rounds, given a history that is wrong in every way."""
  rounds = pool_crash.Rounds(tmp_path / "run")
  with pool_crash.store.DataPool.open(tmp_path / "run" / "pool") as opened:
    opened.append(pool_crash.group(0))
    made = pool_crash.group(7)
    opened.append(pool_crash.types.Group(1, made.task, made.episodes))
  for line in ("ack 0", "ack 2", "step 0 1 2 3", "restored 0", "step 0 1 2 2"):
    rounds._hear(line)
  rounds._look()
  rounds._finish()
  assert rounds.counts == {
    "kill_rounds": 0,
    "lost": 1,
    "torn": 1,
    "trained_twice": 1,
    "skipped": pool_crash.TOTAL - 3,
  }


def may_trace() -> bool:
  if shutil.which("strace") is None:
    return False
  done = subprocess.run(["strace", "-o", "/dev/null", "true"])
  return done.returncode == 0


@pytest.mark.skipif(not may_trace(), reason="strace may not trace here")
def test_no_acknowledgement_precedes_its_syncs(tmp_path):
  found = pool_crash.prove_order(tmp_path, appends=10)
  assert found == {"acks_traced": 10, "unsynced_acks": 0}


_LINES = {
  "data": 'writev(7<segment-00000000.log>, [{iov_base="FJSG"}], 3) = 9',
  "data sync": "fdatasync(7<segment-00000000.log>) = 0",
  "row": 'pwrite64(5<index.sqlite-wal>, "x", 4096, 0) = 4096',
  "row sync": "fdatasync(5<index.sqlite-wal>) = 0",
  "bad sync": "fdatasync(7<segment-00000000.log>) = -1 EIO",
  "ack": 'write(1</dev/null>, "ack 0\\n", 6) = 6',
}


@pytest.mark.parametrize(
  "order, unsynced",
  [
    (["data", "data sync", "row", "row", "row sync", "ack"], 0),
    (["data", "row", "data sync", "row sync", "ack"], 1),
    (["data", "data sync", "row", "ack"], 1),
    (["data", "data sync", "ack"], 1),
    (["data", "data sync", "data", "row", "row sync", "ack"], 2),
    (["data", "bad sync", "row", "row sync", "ack"], 2),
  ],
)
def test_a_trace_is_judged(order, unsynced):
  trace = '1 write(1</dev/null>, "open\\n", 5) = 5\n' + "".join(
    f"1 {_LINES[name]}\n" for name in order
  )
  found = pool_crash.judge(trace)
  assert found == {"acks_traced": 1, "unsynced_acks": unsynced}


def test_damage_of_every_kind_is_noticed(tmp_path):
  trial = pool_damage.Trial(tmp_path, random.Random(1))
  seen = set()
  for _ in range(8):
    kind, good = trial.play()
    assert good, kind
    seen.add(kind)
  assert seen == {"segment", "index", "checkpoint"}


def test_an_episode_has_the_size_that_is_promised():
  group = pool.episode(0)
  head = records.group_record(group)
  assert len(head.body) == pytest.approx(1.8e6, rel=0.01)
  (episode,) = group.episodes
  last = episode.completions[-1]
  assert len(last.prompt_ids) + len(last.response_ids) == 200_000


def test_the_middle_of_the_system_runs(tmp_path):
  found = pool_middleware.run(tmp_path, groups=8)
  assert found["middleware_samples_s"] > 0
