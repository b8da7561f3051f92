"""Control groups, on directories that stand for a kernel's."""

import os
import pathlib
import subprocess

import pytest

from forge_jax.agents.sandbox import base, cgroup

LIMITS = base.Limits(memory_bytes=1000, processes=7, cpus=0.5)


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """Finds groups on a machine with these mounts and groups of its own."""
  monkeypatch.setattr(cgroup, "_accepts", lambda directory: True)

  def find(mounts, own):
    (tmp_path / "mounts").write_text(
      "".join(
        f"30 20 0:1 {root} {tmp_path}/{point} rw - {kind} x {options}\n"
        for point, root, kind, options in mounts
      )
    )
    (tmp_path / "own").write_text("\n".join(own))
    return cgroup.find(str(tmp_path / "mounts"), str(tmp_path / "own"))

  return find


def test_version_2_is_preferred_and_a_sibling(machine, tmp_path):
  own = tmp_path / "cg" / "user" / "me.scope"
  own.mkdir(parents=True)
  (own.parent / "cgroup.subtree_control").write_text("cpu memory pids")
  groups = machine(
    [
      ("cg", "/", "cgroup2", "rw"),
      ("old", "/", "cgroup", "rw,memory"),
    ],
    ["0::/user/me.scope", "3:memory:/"],
  )
  assert groups.version == 2
  assert set(groups.directories.values()) == {own.parent}
  group = groups.make("a", LIMITS)
  (path,) = set(group.paths.values())
  assert path.parent == own.parent
  assert (path / "memory.max").read_text() == "1000"
  assert (path / "pids.max").read_text() == "7"
  assert group.entrances == [str(path / "cgroup.procs")]
  (path / "memory.events").write_text("oom 3\noom_kill 2\noom_group_kill 0\n")
  assert group.kills() == 2


def test_version_2_without_controllers_is_passed_over(machine, tmp_path):
  (tmp_path / "unified").mkdir()
  for name in ("memory", "pids", "cpu"):
    (tmp_path / name / "mine").mkdir(parents=True)
  groups = machine(
    [
      ("unified", "/", "cgroup2", "rw"),
      ("memory", "/", "cgroup", "rw,memory"),
      ("pids", "/", "cgroup", "rw,pids"),
      ("cpu", "/box", "cgroup", "rw,cpu,cpuacct"),
    ],
    ["0::/", "1:memory:/mine", "2:pids:/", "3:cpu,cpuacct:/box/mine"],
  )
  assert groups.version == 1
  assert groups.directories == {
    "memory": tmp_path / "memory" / "mine",
    "pids": tmp_path / "pids",
    "cpu": tmp_path / "cpu" / "mine",
  }
  group = groups.make("a", LIMITS)
  memory = group.paths["memory"]
  assert (memory / "memory.limit_in_bytes").read_text() == "1000"
  assert (group.paths["pids"] / "pids.max").read_text() == "7"
  assert len(group.entrances) == 3


def test_there_may_be_none(machine):
  assert machine([], ["0::/"]) is None
  assert machine([("m", "/", "cgroup", "rw,memory")], ["1:memory:/"]) is None


def test_the_groups_of_the_dead_are_swept(tmp_path):
  dead = subprocess.Popen(["true"])
  dead.wait()
  gone = tmp_path / f"forge-sandbox-{dead.pid}-0"
  kept = tmp_path / f"forge-sandbox-{os.getpid()}-0"
  gone.mkdir()
  kept.mkdir()
  cgroup.Groups(2, {"memory": tmp_path}).sweep()
  assert kept.exists() and not gone.exists()


async def test_a_sandbox_is_in_its_group_and_leaves_none(open_box):
  box = await open_box(base.Limits(processes=50))
  if box._group is None:
    pytest.skip("this machine lets this user make no control groups")
  script = "i=0; while [ $i -lt 60 ]; do sleep 9 & i=$((i+1)); done"
  result = await box.run(["sh", "-c", script], seconds=5)
  assert b"fork" in result.stderr and result.code == 2
  paths = set(box._group.paths.values())
  assert all(p.exists() for p in paths)
  await box.aclose()
  assert not any(pathlib.Path(p).exists() for p in paths)
