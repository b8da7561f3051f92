"""Lives of one small run: ended by signals in the middle of steps, continued.

    python tests/system/resume_run.py WORKDIR MODEL STEPS SIGNAL...

Each life is a fork of a process that has imported everything and started
nothing. A life counts the steps that it commits and sends itself the next
signal at a random instant after a random one of them; the life after the last
signal is led to its end.
"""

import os
import pathlib
import random
import signal
import sys
import threading

# Small matrices are added up in one order only by one thread.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_run

from forge_jax.pool import queue as queue_lib
from launch import local


def live(
  workdir: str, model: str, steps: int, number: int | None, seed: int
) -> None:
  """One life; `number` is the signal that ends it, None: its end."""
  rng = random.Random(seed)
  last = rng.randint(1, 3)  # steps of this life before the signal
  commit, done = queue_lib.GroupQueue.commit, []

  def commit_and_count(self, step):
    commit(self, step)
    done.append(step)
    if number is not None and len(done) == last:
      instant = threading.Timer(
        rng.uniform(0.0, 0.4), os.kill, (os.getpid(), number)
      )
      instant.daemon = True
      instant.start()

  queue_lib.GroupQueue.commit = commit_and_count
  values = small_run.values(model) | {"steps": steps}
  values["checkpoint"] |= {"every": 2}
  # Steps of the engine of one size: else a token's last bit depends on what
  # is computed beside it, which a restart changes.
  values["engine"] |= {"slots": 16, "decode_rows": (16,), "prefill_rows": (16,)}
  values["engine"] |= {"row_multiple": 16 + 16 * 16}
  values["eval"] |= {"heldout": 1, "phrasings": 1, "every": 0}
  local.LocalRun(values, workdir).train()


def main(workdir: str, model: str, steps: str, *signals: str) -> None:
  """Plays the lives, and prints how each one ended."""
  for seed, text in enumerate([*signals, ""]):
    number = int(text) if text else None
    child = os.fork()
    if not child:
      try:
        live(workdir, model, int(steps), number, seed)
        os._exit(0)
      except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    print(f"life {seed} ended with status {status}", flush=True)
    if status != (signal.SIGKILL if number == signal.SIGKILL else 0):
      raise SystemExit(f"life {seed} was to end by signal {number}")


if __name__ == "__main__":
  main(*sys.argv[1:])
