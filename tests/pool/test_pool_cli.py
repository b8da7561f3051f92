"""The pool's commands, as the shell runs them."""

import subprocess
import sys

from pyarrow import parquet
import pytest
import sample_groups

from forge_jax.pool import __main__ as cli
from forge_jax.pool import records, segment, store


@pytest.fixture
def path(tmp_path):
  with store.DataPool.open(tmp_path / "pool", store.PoolConfig(1)) as pool:
    for index in range(5):
      pool.append(sample_groups.make_group(index, seed=index))
    pool.claim(records.Claim(1, trained=(0, 2), dropped=(1,)))
    pool.annotate(2, {"rescored": 0.5})
  return tmp_path / "pool"


@pytest.fixture
def run(path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "160")

  def call(command, *arguments, status=0):
    assert cli.main([command, str(path), *arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status == 1 else captured.out

  return call


def test_ls_lists_groups_and_what_became_of_them(run):
  lines = run("ls").splitlines()
  assert "fate" in lines[0] and len(lines) == 7
  assert "step 1" in lines[1] and "dropped, step 1" in lines[2]
  assert "waits" in lines[4] and "sums/train/7" in lines[4]
  assert "5 groups" in lines[-1] and "2 groups wait" in lines[-1]
  assert len(run("ls", "--last=2").splitlines()) == 4


def test_show_shows_a_group(run):
  text = run("show", "2")
  assert "group 2, task sums/train/7, attempt 0: step 1" in text
  assert (
    "'rescored': 0.5" in text and "timed_out" in text and "answer 0.3" in text
  )
  assert "group 9 is not among its 5" in run("show", "9", status=1)


def test_verify_finds_and_repairs(run, path):
  assert "5 groups, 1 claims" in run("verify")
  file = segment.path_of(path, 3)
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  text = run("verify", status=2)
  assert "damaged: " in text and "lost: group 3" in text
  assert "what is good is kept" in run("verify", "--repair")
  assert "4 groups" in run("verify")


def test_export_writes_parquet(run, tmp_path):
  file = tmp_path / "e.parquet"
  assert "15 episodes" in run("export", str(file))
  assert parquet.read_table(file).num_rows == 15
  run("export", str(tmp_path / "c.parquet"), "--table=completions")


def test_gc_drops_what_was_trained(run):
  assert "dropped 3 groups" in run("gc", "--through=1")
  assert "2 groups," in run("ls")


def test_the_module_runs_and_a_wrong_path_is_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "forge_jax.pool", "ls", str(tmp_path / "none")],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert "there is no pool" in done.stderr and "Traceback" not in done.stderr
