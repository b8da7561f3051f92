"""Two rollout hosts of their own processes, one trainer, a real PostgreSQL."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import small_run

from forge_jax import errors
from forge_jax.pool import store
from launch import keys, local, rollout_service

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6


@pytest.fixture
def values(model, postgres_server, monkeypatch):
  """Short word problems: hosts know the domains that ship."""
  monkeypatch.setenv(keys.ADMIN_TOKEN, "secret")
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    port = one.getsockname()[1]
  made = small_run.values(model) | {"steps": STEPS}
  made["engine"] |= {"context": 208}
  made["domains"] = {"word_problems": {"max_tokens": 6, "weight": 1.0}}
  made["gateway"] |= {"port": port}
  made["pool"] |= {"database": postgres_server, "schema": "hosts"}
  made["pool"] |= {"lease_seconds": 2.0}
  made["rollout"] |= {"permits": 4, "max_lag": 1}
  made["eval"] |= {"heldout": 0, "phrasings": 0, "every": 0}
  return made


def start_host(workdir, port, name):
  # JAX that cannot be imported shows that a host needs none.
  code = (
    "import sys; sys.modules['jax'] = None\n"
    "from launch import rollout; rollout.run()"
  )
  return subprocess.Popen(
    [
      *(sys.executable, "-c", code, f"--workdir={workdir}"),
      *(f"--gateway=http://127.0.0.1:{port}", f"--host={name}"),
    ],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def stored_by(path):
  """The segment of each stored group; a host has segments of its own."""
  if not path.exists():
    return []
  with store.DataPool.open(path, readonly=True) as pool:
    rows = [pool.index.find(1, index) for index in pool.indices()]
  return [row.segment for row in rows]


def test_two_hosts_feed_one_trainer_and_one_of_them_is_killed(values, tmp_path):
  run = tmp_path / "run"
  hosts = {}
  killed = []
  over = threading.Event()

  def play():
    """Starts both hosts, and kills one when each has stored something."""
    while not (run / "config.json").exists():
      time.sleep(0.05)
    for name in ("a", "b"):
      hosts[name] = start_host(run, values["gateway"]["port"], name)
    while len(set(stored_by(run / "pool"))) < 2 and not over.wait(0.1):
      pass
    hosts["a"].send_signal(signal.SIGKILL)
    killed.append(len(stored_by(run / "pool")))

  player = threading.Thread(target=play)
  player.start()
  try:
    local.LocalRun(values, run).train()
  finally:
    over.set()
    player.join()
    hosts["b"].send_signal(signal.SIGTERM)
    said = hosts["b"].communicate(timeout=60)[0]
    hosts["a"].kill()
    hosts["a"].communicate()
  assert "rollout host b has ended" in said and hosts["b"].returncode == 0
  assert hosts["a"].returncode == -signal.SIGKILL
  with store.DataPool.open(run / "pool", readonly=True) as pool:
    claims = pool.claims()
    trained = [pool.get(i) for claim in claims for i in claim.trained]
  assert [claim.step for claim in claims] == list(range(1, STEPS + 1))
  # Every task of the run once, though a host died with some of them.
  assert sorted(g.number for g in trained) == list(range(4 * STEPS))
  assert killed[0] < 4 * STEPS
  assert {e.status.value for g in trained for e in g.episodes} == {"completed"}
  # The weights that the hosts sampled from grew with the training.
  versions = {g.version for g in trained}
  assert max(versions) >= STEPS - 2 > min(versions) == 0


def test_what_a_host_cannot_do_is_said(values, tmp_path, monkeypatch):
  with pytest.raises(errors.ConfigError, match="start the trainer first"):
    rollout_service.RolloutService(str(tmp_path), "http://127.0.0.1:1")
  (tmp_path / "config.json").write_text(json.dumps(values))
  monkeypatch.delenv(keys.ADMIN_TOKEN)
  with pytest.raises(errors.ConfigError, match=keys.ADMIN_TOKEN):
    rollout_service.RolloutService(str(tmp_path), "http://127.0.0.1:1")
  values["pool"]["database"] = ""
  (tmp_path / "config.json").write_text(json.dumps(values))
  with pytest.raises(errors.ConfigError, match="pool is embedded"):
    rollout_service.RolloutService(str(tmp_path), "http://127.0.0.1:1")
