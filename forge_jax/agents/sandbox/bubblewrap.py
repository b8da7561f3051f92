"""Sandboxes of the Linux kernel, made by bubblewrap.

docs/how-to/sandbox.md says what they protect and what they do not. The layers,
from the outside: control groups limit memory, processes and CPUs; namespaces
hide other processes, the network, the machine's files; the file systems that
are seen are read-only but for one, which is limited; no capabilities, no gain
of privileges, no further user namespaces; a filter of system calls.
"""

import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import marshal
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

from forge_jax import errors
from forge_jax.agents.sandbox import base, box, cgroup, relay, seccomp

_HERE = pathlib.Path(__file__).parent
_GUEST = ("guest", "forward", "processes")  # the modules that run inside
_OLDEST = (0, 8)  # the first with --disable-userns and --size
_HOME = "/home/agent"
_WORK = f"{_HOME}/work"
_USER = 1000  # the program's user and group, as it sees them
# When root opens sandboxes, each gets a user of its own in this range, if the
# user namespace that root is in has it.
_FIRST_USER, _USERS = 1 << 30, 1 << 20
_NOBODY = 65534
# What of /etc a program needs in order to find libraries and certificates.
_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "pki")
_ETC += ("ssl", "ca-certificates", "localtime")
# Of /proc: about the machine, and of no use to a program.
_MASKED = ("keys", "key-users", "kallsyms", "kmsg", "timer_list", "slabinfo")
_MASKED += ("sched_debug", "latency_stats", "modules", "vmallocinfo")
_TEXTS = {
  "passwd": f"agent:x:{_USER}:{_USER}:agent:{_HOME}:/bin/sh\n",
  "group": f"agent:x:{_USER}:\n",
  "hosts": "127.0.0.1 localhost\n",
  "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_numbers = itertools.count()  # of control groups, unique within a process
_HELP = """
A sandbox needs user namespaces. Where they are refused:
  in a container: run it with --security-opt seccomp=unconfined
    --security-opt apparmor=unconfined --cap-add SYS_ADMIN, or as root of a VM;
  Ubuntu 24.04 and later: sysctl kernel.apparmor_restrict_unprivileged_userns=0;
  elsewhere: sysctl user.max_user_namespaces=100000, and on older Debian
    kernel.unprivileged_userns_clone=1."""


@dataclasses.dataclass(frozen=True, slots=True)
class BubblewrapConfig:
  """What every sandbox of a backend shows of the machine."""

  # Directories and files seen, read-only, at their own paths: an agent's
  # installation. Sockets in them can be connected to.
  show: tuple[str, ...] = ()
  path: tuple[str, ...] = ()  # directories in front of PATH
  use_cgroups: bool = True  # where they can be; else processes are watched


class Bubblewrap:
  """Opens sandboxes; used from one asyncio loop."""

  def __init__(self, config: BubblewrapConfig | None = None):
    """Looks for what a sandbox needs.

    Raises:
      SandboxError: bubblewrap is not installed, or too old, or this is no
        Linux machine that a filter of system calls is known for.
      ConfigError: something to be shown is not there.
    """
    self._config = config or BubblewrapConfig()
    self._program = _find_program()
    for path in self._config.show:
      if not os.path.isabs(path) or not os.path.exists(path):
        raise errors.ConfigError(
          f"sandbox show: {path!r} is not an absolute path of what exists"
        )
    self.groups = cgroup.find() if self._config.use_cgroups else None
    if self.groups is not None:
      self.groups.sweep()
    self._filter = seccomp.program(hidden_memory=self.groups is not None)

  async def open(
    self, limits: base.Limits | None = None, *, gateway: str | None = None
  ) -> box.Box:
    """Opens a sandbox; see `base.Backend`.

    Raises:
      SandboxError: the kernel refuses; the message has its words.
      ConfigError: the gateway's origin is none.
    """
    limits = limits or base.Limits()
    async with contextlib.AsyncExitStack() as undo:
      folder = box.make_folder("forge-sandbox")
      undo.callback(shutil.rmtree, folder, ignore_errors=True)
      os.chmod(folder, 0o711)
      stage = os.path.join(folder, "stage")
      os.mkdir(stage)
      if gateway is not None:
        way = relay.Relay(gateway)
        undo.push_async_callback(way.aclose)
        await way.start(os.path.join(folder, "gateway.sock"))
      group = None
      if self.groups is not None:
        group = self.groups.make(str(next(_numbers)), limits)
        undo.callback(group.remove)
      plan = self._plan(folder, limits, group, gateway is not None)
      process = await asyncio.create_subprocess_exec(
        _python(),
        "-ISB",
        str(_HERE / "enter.py"),
        marshal.dumps(plan).hex(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
      )
      opened = box.Box(
        process,
        work=_WORK,
        home=_HOME,
        gateway=gateway and f"http://127.0.0.1:{box.GATEWAY_PORT}",
        limits=limits,
        group=group,
        on_close=(undo.pop_all().aclose,),
      )
    try:
      return await box.open_box(opened)
    except errors.SandboxError as error:
      if not re.search("namespace|uid map", str(error)):
        raise
      raise errors.SandboxError(f"{error}{_HELP}") from error

  def _plan(
    self,
    folder: str,
    limits: base.Limits,
    group: cgroup.Group | None,
    has_gateway: bool,
  ) -> dict[str, object]:
    """What `enter` reads."""
    stage = os.path.join(folder, "stage")
    binds = {f"show{p}": p for p in self._shown()}
    binds |= {
      f"etc/{name}": os.path.realpath(f"/etc/{name}")
      for name in _ETC
      if os.path.exists(f"/etc/{name}")
    }
    if has_gateway:
      binds["gateway.sock"] = os.path.join(folder, "gateway.sock")
    return {
      "parent": os.getpid(),
      "user": _pick_user(),
      "cgroups": group.entrances if group else [],
      "stage": stage,
      "texts": {f"etc/{n}": text.encode() for n, text in _TEXTS.items()}
      | _compiled_guest(),
      "binds": binds,
      "disk": [limits.disk_bytes, limits.files],
      "directories": ["home", "home/work", "tmp", "shm"],
      "seccomp": self._filter.hex(),
      "command": [
        self._program,
        *_namespaces(),
        *_file_systems(stage, binds),
        *("--seccomp", "{seccomp}", "--"),
        *(_python(), "-ISB", "/run/guest.pyc"),
        self._guest_config(limits, has_gateway).to_json(),
      ],
    }

  def _guest_config(
    self, limits: base.Limits, has_gateway: bool
  ) -> box.GuestConfig:
    watched = self.groups is None
    rlimits = limits.of_each_process() | {
      "RLIMIT_NPROC": limits.processes,
      "RLIMIT_MEMLOCK": base.MIB,
      "RLIMIT_MSGQUEUE": 0,
    }
    if watched:
      rlimits["RLIMIT_DATA"] = limits.memory_bytes
    return box.GuestConfig(
      work=_WORK,
      env=self._environment(),
      output_bytes=limits.output_bytes,
      rlimits=rlimits,
      watch_memory=limits.memory_bytes if watched else 0,
      forward={"port": box.GATEWAY_PORT, "path": box.GATEWAY_SOCKET}
      if has_gateway
      else None,
    )

  def _environment(self) -> dict[str, str]:
    folders = (
      *self._config.path,
      os.path.dirname(_python()),
      *("/usr/local/bin", "/usr/bin", "/bin"),
    )
    return {
      "PATH": ":".join(folders),
      "HOME": _HOME,
      "USER": "agent",
      "TMPDIR": "/tmp",
      "LANG": "C.UTF-8",
    }

  def _shown(self) -> list[str]:
    """The machine's paths that a sandbox sees, parents before children."""
    paths = {"/usr", *self._config.show}
    paths |= {f"/{name}" for name in _top_directories()}
    paths |= {sys.base_prefix}
    return sorted(p for p in paths if not _is_below(p, paths))


def _is_below(path: str, paths: set[str]) -> bool:
  return any(str(parent) in paths for parent in pathlib.Path(path).parents)


def _top_directories() -> list[str]:
  """Of /bin, /lib and the like, those that are no links into /usr."""
  names = ("bin", "sbin", "lib", "lib32", "lib64")
  return [
    n for n in names if os.path.isdir(f"/{n}") and not os.path.islink(f"/{n}")
  ]


def _namespaces() -> list[str]:
  return [
    *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net"),
    *("--unshare-uts", "--unshare-cgroup-try", "--disable-userns"),
    *("--uid", str(_USER), "--gid", str(_USER), "--hostname", "sandbox"),
    *("--cap-drop", "ALL", "--new-session", "--die-with-parent"),
    *("--as-pid-1", "--clearenv"),
  ]


def _file_systems(stage: str, binds: dict[str, str]) -> list[str]:
  args = ["--proc", "/proc", "--dev", "/dev"]
  for name in _MASKED:
    if os.path.exists(f"/proc/{name}"):
      args += ["--ro-bind", "/dev/null", f"/proc/{name}"]
  for source, path in (
    ("tmp", "/tmp"),
    ("home", _HOME),
    ("shm", "/dev/shm"),
  ):
    args += ["--bind", f"{stage}/disk/{source}", path]
  for name in sorted(binds):  # what is shown may lie below those
    if name.startswith("show/"):
      args += ["--ro-bind", f"{stage}/{name}", name.removeprefix("show")]
    elif name.startswith("etc/"):
      args += ["--ro-bind", f"{stage}/{name}", f"/{name}"]
  for name in ("bin", "sbin", "lib", "lib32", "lib64"):
    if os.path.islink(f"/{name}"):
      args += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
  for name in _TEXTS:
    args += ["--ro-bind", f"{stage}/etc/{name}", f"/etc/{name}"]
  for name in _GUEST:
    args += ["--ro-bind", f"{stage}/{name}.pyc", f"/run/{name}.pyc"]
  if "gateway.sock" in binds:
    args += ["--bind", f"{stage}/gateway.sock", box.GATEWAY_SOCKET]
  # Both are file systems in memory, without a limit.
  return [
    *args,
    "--remount-ro",
    "/dev",
    "--remount-ro",
    "/",
    "--chdir",
    _WORK,
  ]


@functools.cache
def _compiled_guest() -> dict[str, bytes]:
  """The modules that run inside, so that not every sandbox compiles them."""
  found = {}
  # Sixteen bytes: whose code it is; then, not to be checked, of when.
  head = importlib.util.MAGIC_NUMBER + bytes(12)
  for name in _GUEST:
    source = (_HERE / f"{name}.py").read_bytes()
    code = compile(source, f"/run/{name}.py", "exec", dont_inherit=True)
    found[f"{name}.pyc"] = head + marshal.dumps(code)
  return found


def _python() -> str:
  """The interpreter that runs beside this one: itself, outside of any venv."""
  return os.path.realpath(sys.executable)


def _pick_user() -> int | None:
  """A user for root to become; None: this is not root."""
  if os.geteuid() != 0:
    return None
  user = _FIRST_USER + random.SystemRandom().randrange(_USERS)
  lines = pathlib.Path("/proc/self/uid_map").read_text().splitlines()
  for line in lines:
    first, _, count = map(int, line.split())
    if first <= _FIRST_USER and first + count >= _FIRST_USER + _USERS:
      return user
  return _NOBODY


def _find_program() -> str:
  if not sys.platform.startswith("linux"):
    raise errors.SandboxError(
      f"bubblewrap needs Linux, and this is {sys.platform}; "
      "unsafe.UnsafeProcess runs trusted programs anywhere"
    )
  program = shutil.which("bwrap")
  if program is None:
    raise errors.SandboxError(
      "bubblewrap (bwrap) is not installed: apt-get install bubblewrap, dnf "
      "install bubblewrap, or the like"
    )
  said = subprocess.run(
    [program, "--version"], capture_output=True, text=True, check=False
  ).stdout
  found = re.search(r"(\d+)\.(\d+)", said)
  if found is None or tuple(map(int, found.groups())) < _OLDEST:
    raise errors.SandboxError(
      f"{program} is {said.strip() or 'of no known version'}; expected 0.8 or "
      "newer"
    )
  return program
