"""Control groups: limits on what all processes of a sandbox use together.

Version 2 is used where its memory and pids controllers can be, version 1 (one
hierarchy a controller) otherwise. A sandbox's group lies below or beside this
process's own, so that limits from outside stay in force.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import signal
import time

from forge_jax.agents.sandbox import base

_PERIOD = 100_000  # microseconds in which a group may use its share of CPUs
_NEEDED = ("memory", "pids")
_PREFIX = "forge-sandbox"


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
  """Where groups can be made: a directory, or one for each controller."""

  version: int  # 1 or 2
  directories: dict[str, pathlib.Path]  # by controller; in version 2 all alike

  def make(self, name: str, limits: base.Limits) -> "Group":
    """A new group with its limits.

    Raises:
      OSError: it cannot be made.
    """
    label = f"{_PREFIX}-{os.getpid()}-{name}"
    paths = {c: d / label for c, d in self.directories.items()}
    group = Group(self.version, paths)
    for path in set(paths.values()):
      path.mkdir()
    try:
      group.limit(limits)
    except OSError:
      group.remove()
      raise
    return group

  def sweep(self) -> None:
    """Removes the empty groups of processes that are no more."""
    for directory in set(self.directories.values()):
      for path in directory.glob(f"{_PREFIX}-*-*"):
        owner = path.name.split("-")[2]
        if not os.path.exists(f"/proc/{owner}"):
          with contextlib.suppress(OSError):
            path.rmdir()


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
  """One sandbox's group."""

  version: int
  paths: dict[str, pathlib.Path]  # by controller

  @property
  def entrances(self) -> list[str]:
    """Files that take the writer of "0" into the group."""
    return [str(p / "cgroup.procs") for p in sorted(set(self.paths.values()))]

  def limit(self, limits: base.Limits) -> None:
    """Sets what the group may use; raises OSError."""
    memory, quota = str(limits.memory_bytes), round(limits.cpus * _PERIOD)
    if self.version == 2:
      self._write("memory", "memory.max", memory)
      self._write("memory", "memory.swap.max", "0", optional=True)
      self._write("cpu", "cpu.max", f"{quota} {_PERIOD}", optional=True)
    else:
      self._write("memory", "memory.limit_in_bytes", memory)
      self._write(
        "memory", "memory.memsw.limit_in_bytes", memory, optional=True
      )
      self._write("cpu", "cpu.cfs_period_us", str(_PERIOD), optional=True)
      self._write("cpu", "cpu.cfs_quota_us", str(quota), optional=True)
    self._write("pids", "pids.max", str(limits.processes))

  def kills(self) -> int:
    """How many of its processes were killed because memory ran out."""
    name = "memory.events" if self.version == 2 else "memory.oom_control"
    text = (self.paths["memory"] / name).read_text()
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0

  def kill(self) -> None:
    """Kills every process in the group."""
    with contextlib.suppress(OSError):  # older kernels have no such file
      (self.paths["pids"] / "cgroup.kill").write_text("1")
      return
    with contextlib.suppress(OSError):
      for line in (self.paths["pids"] / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(line), signal.SIGKILL)

  def remove(self) -> bool:
    """Removes the group; False: it has processes yet."""
    for path in set(self.paths.values()):
      try:
        path.rmdir()
      except FileNotFoundError:
        pass
      except OSError as error:
        if error.errno != errno.EBUSY:
          raise
        return False
    return True

  def _write(
    self, controller: str, name: str, text: str, optional: bool = False
  ) -> None:
    path = self.paths.get(controller)
    if optional and (path is None or not (path / name).exists()):
      return
    (path / name).write_text(text)


def find(
  mounts: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup"
) -> Groups | None:
  """Where this process can make groups that limit memory and processes.

  Args:
    mounts: lists the mounted file systems; see proc_pid_mountinfo(5).
    own: lists this process's groups; see cgroups(7).

  Returns:
    None: nowhere.
  """
  mounted = _mounted(pathlib.Path(mounts).read_text())
  groups = {}  # by the controllers' names as written; "" is version 2
  for line in pathlib.Path(own).read_text().splitlines():
    _, names, path = line.split(":", 2)
    groups[names] = path
  return _find_v2(mounted, groups) or _find_v1(mounted, groups)


def _mounted(text: str) -> dict[str, tuple[str, str]]:
  """By controller, "" for version 2: mount point and the group mounted."""
  found = {}
  for line in text.splitlines():
    before, _, after = line.partition(" - ")
    root, point = before.split()[3:5]
    kind, _, options = after.split()[:3]
    if kind == "cgroup2":
      found[""] = point, root
    elif kind == "cgroup":
      found |= {name: (point, root) for name in options.split(",")}
  return found


def _own_directory(mounted: tuple[str, str], group: str) -> pathlib.Path:
  """The directory of this process's group; the mount point if unseen."""
  point, root = mounted
  below = os.path.relpath(group, root)
  path = pathlib.Path(point) / below
  return path if path.is_dir() and ".." not in below else pathlib.Path(point)


def _find_v2(
  mounted: dict[str, tuple[str, str]], groups: dict[str, str]
) -> Groups | None:
  if "" not in mounted or "" not in groups:
    return None
  own = _own_directory(mounted[""], groups[""])
  # A group with processes cannot hand controllers down, so that mostly a
  # sandbox's group is a sibling of this process's own.
  for directory in (own, *own.parents[:3]):
    if not directory.is_relative_to(mounted[""][0]):
      break
    if _hands_down(directory) and _accepts(directory):
      return Groups(2, dict.fromkeys((*_NEEDED, "cpu"), directory))
  return None


def _hands_down(directory: pathlib.Path) -> bool:
  control = directory / "cgroup.subtree_control"
  try:
    if not set(_NEEDED) <= set(control.read_text().split()):
      control.write_text(" ".join(f"+{name}" for name in _NEEDED))
    with contextlib.suppress(OSError):
      control.write_text("+cpu")
  except OSError:
    return False
  return True


def _find_v1(
  mounted: dict[str, tuple[str, str]], groups: dict[str, str]
) -> Groups | None:
  directories = {}
  for names, path in groups.items():
    for name in names.split(","):
      if name in (*_NEEDED, "cpu") and name in mounted:
        directories[name] = _own_directory(mounted[name], path)
  if not set(_NEEDED) <= set(directories):
    return None
  usable = {n: d for n, d in directories.items() if _accepts(d)}
  return Groups(1, usable) if set(_NEEDED) <= set(usable) else None


def _accepts(directory: pathlib.Path) -> bool:
  """Whether a process of this user can be moved to a group made here."""
  probe = directory / f"{_PREFIX}-{os.getpid()}-probe"
  try:
    probe.mkdir()
  except OSError:
    return False
  try:
    child = os.posix_spawn(
      "/bin/sh",
      ["sh", "-c", 'echo 0 > "$1"/cgroup.procs', "sh", str(probe)],
      {},
      file_actions=[(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)],
    )
    return os.waitpid(child, 0)[1] == 0
  finally:
    for _ in range(100):
      with contextlib.suppress(OSError):
        probe.rmdir()
        break
      time.sleep(0.01)
