"""Every probe gets out where nothing holds it, and out of no sandbox."""

import asyncio
import dataclasses
import json
import os
import pathlib
import secrets
import socket
import subprocess
import sys

import pytest

from forge_jax.agents.sandbox import base

PROBES = pathlib.Path(__file__).parent / "probes"
LIMITS = base.Limits(
  memory_bytes=192 * base.MIB,
  processes=64,
  disk_bytes=32 * base.MIB,
  files=2000,
)


@dataclasses.dataclass
class Outside:
  """What lies outside, for probes to find."""

  folder: pathlib.Path
  secret: str
  victim: subprocess.Popen
  port: int
  socket_path: str
  abstract: str

  @property
  def secret_file(self):
    return str(self.folder / "secret.txt")


@pytest.fixture
def outside(tmp_path):
  secret = secrets.token_hex(16)
  (tmp_path / "secret.txt").write_text(secret)
  victim = subprocess.Popen(["sleep", "300"], env={"SECRET": secret})
  path, abstract = str(tmp_path / "socket"), f"probe-{secret}"
  with (
    socket.create_server(("127.0.0.1", 0)) as tcp,
    socket.socket(socket.AF_UNIX) as by_path,
    socket.socket(socket.AF_UNIX) as by_name,
  ):
    by_path.bind(path)
    os.chmod(path, 0o777)
    by_path.listen()
    by_name.bind("\0" + abstract)
    by_name.listen()
    port = tcp.getsockname()[1]
    yield Outside(tmp_path, secret, victim, port, path, abstract)
  victim.kill()
  victim.wait()


# A case: the probe's file and name, and its arguments, which are functions of
# what lies outside: first those inside, then those for the control outside.
def same(arguments=lambda o: {}):
  return arguments, arguments


SYSTEM = ["/", "/usr", "/usr/bin", "/etc", "/bin", "/dev", "/run", "/proc"]
SETTINGS = [
  "/proc/sys/kernel/core_pattern",
  "/proc/sys/kernel/hostname",
  "/proc/sys/vm/overcommit_memory",
  "/proc/sys/user/max_user_namespaces",
  "/proc/sysrq-trigger",
]
CASES = {
  "reach.read_files": (
    lambda o: {
      "paths": [
        o.secret_file,
        "/etc/shadow",
        "/etc/hostname",
        "/proc/kcore",
        "/proc/keys",
        "/proc/1/root/etc/hostname",
        "/var/log/dpkg.log",
        "/sys/kernel/uevent_seqnum",
        *[str(p) for p in (PROBES, pathlib.Path.home() / ".bashrc")],
      ]
    },
    lambda o: {"paths": [o.secret_file]},
  ),
  "reach.read_environments": same(lambda o: {"secret": o.secret}),
  "reach.see_others": same(lambda o: {"pids": [o.victim.pid]}),
  "reach.kill_others": (
    # Inside, 1 is the guest's own first process.
    lambda o: {
      "pids": [
        pid for pid in (o.victim.pid, os.getpid(), os.getppid()) if pid != 1
      ]
    },
    lambda o: {"pids": [o.victim.pid]},
  ),
  "reach.attack_guest": (
    lambda o: {"pid": 1},
    lambda o: {"pid": o.victim.pid},
  ),
  "reach.write_files": (
    lambda o: {"directories": [*SYSTEM, sys.base_prefix, str(o.folder)]},
    lambda o: {"directories": [str(o.folder)]},
  ),
  "reach.write_settings": same(
    lambda o: {"paths": [*SETTINGS, "/sys/fs/cgroup/cgroup.procs"]}
  ),
  "reach.connect_tcp": (
    lambda o: {
      "addresses": [
        ("127.0.0.1", o.port),
        ("::1", o.port),
        ("169.254.169.254", 80),
        ("10.0.0.1", 80),
        ("127.0.0.1", 22),
      ]
    },
    lambda o: {"addresses": [("127.0.0.1", o.port)]},
  ),
  "reach.send_udp": (
    lambda o: {"addresses": [("192.0.2.1", 53), ("169.254.169.254", 53)]},
    lambda o: {"addresses": [("127.0.0.1", o.port)]},
  ),
  "reach.connect_unix": (
    lambda o: {
      "paths": [o.socket_path],
      "abstract": [o.abstract],
      "below": "/",
      "allowed": ["/run/gateway.sock"],
    },
    lambda o: {
      "paths": [],
      "abstract": [o.abstract],
      "below": str(o.folder),
      "allowed": [],
    },
  ),
  "reach.make_devices": same(),
  "reach.inject_into_terminals": same(),
  "reach.gain_privileges": same(),
  "kernel.open_odd_sockets": same(),
  "kernel.mount_things": same(),
  "kernel.make_namespaces": same(),
  "kernel.trace_processes": same(),
  "kernel.load_bpf": same(),
  "kernel.use_io_uring": same(),
  "kernel.use_perf": same(),
  "kernel.use_userfaultfd": same(),
  "kernel.use_keyring": same(),
  "kernel.set_clock": same(),
  "kernel.change_kernel": same(),
  "kernel.use_foreign_calls": same(),
  "resources.fork_many": same(lambda o: {"count": 100}),
  "resources.fill_disk": (
    lambda o: {
      "folders": ["/tmp", "/home/agent", "/dev/shm"],
      "each": 40 * base.MIB,
      "files": 3000,
    },
    lambda o: {
      "folders": [str(o.folder)],
      "each": 40 * base.MIB,
      "files": 3000,
    },
  ),
}
MEMORY = {
  kind: {"processes": 8, "each": 40 * base.MIB, "kind": kind}
  for kind in ("private", "shared", "file")
}
# What only root could do outside; others are stopped with or without us.
FOR_ROOT = (
  *("reach.write_settings", "kernel.load_bpf", "kernel.mount_things"),
  *("kernel.set_clock", "kernel.change_kernel"),
  *("kernel.use_perf", "kernel.use_userfaultfd"),
)


async def probe(box, name, arguments):
  """Runs a probe inside; what it managed."""
  file, function = name.split(".")
  await box.put({f"{file}.py": (PROBES / f"{file}.py").read_bytes()})
  command = ["python3", f"{file}.py", function, json.dumps(arguments)]
  result = await box.run(command, seconds=60)
  assert result.failure is None, result
  return json.loads(result.stdout)


async def probe_outside(name, arguments, folder):
  """Runs a probe as an ordinary process, with a terminal it may not have."""
  file, function = name.split(".")
  command = [sys.executable, str(PROBES / f"{file}.py"), function]
  if os.geteuid() == 0:  # so that what is mounted is gone with it
    command = ["unshare", "--mount", *command]
  process = await asyncio.create_subprocess_exec(
    *command,
    json.dumps(arguments),
    cwd=folder,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    start_new_session=True,
  )
  stdout, _ = await process.communicate()
  assert process.returncode == 0
  return json.loads(stdout)


@pytest.mark.parametrize("use_cgroups", [True, False])
async def test_no_probe_gets_out(open_box, outside, use_cgroups):
  box = await open_box(
    LIMITS,
    gateway=f"http://127.0.0.1:{outside.port}",
    use_cgroups=use_cgroups,
  )
  managed = {}
  for name, (arguments, _) in CASES.items():
    if done := await probe(box, name, arguments(outside)):
      managed[name] = done
  assert managed == {}
  assert outside.victim.poll() is None


# What docs/how-to/sandbox.md says that containers leave open: files of their
# own, and files without number.
IN_CONTAINERS = (
  *("/etc/hostname", "/proc/keys", "/sys/kernel/uevent_seqnum"),
  *(
    f"3000 files in {folder}" for folder in ("/tmp", "/home/agent", "/dev/shm")
  ),
)


async def test_no_probe_gets_out_of_a_container(open_container, outside):
  box = await open_container(LIMITS)
  managed = []
  for name, (arguments, _) in CASES.items():
    managed += await probe(box, name, arguments(outside))
  assert set(managed) <= set(IN_CONTAINERS)
  assert outside.victim.poll() is None


@pytest.mark.parametrize("name", CASES)
async def test_the_probe_gets_out_of_nothing(outside, name):
  if os.geteuid() != 0 and name in FOR_ROOT:
    pytest.skip("needs root")
  arguments = CASES[name][1](outside)
  assert await probe_outside(name, arguments, outside.folder) != []


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("use_cgroups", [True, False])
async def test_memory_is_limited_over_all_processes(
  open_box, kind, use_cgroups
):
  box = await open_box(LIMITS, use_cgroups=use_cgroups)
  await box.put({"resources.py": (PROBES / "resources.py").read_bytes()})
  command = ["python3", "resources.py", "fill_memory"]
  result = await box.run([*command, json.dumps(MEMORY[kind])], seconds=60)
  # A file in memory may also be refused as it grows, or at all.
  assert result.out_of_memory or kind == "file", result
  assert result.failure or json.loads(result.stdout) == []
  # The sandbox serves on.
  assert (await box.run(["echo", "well"], seconds=5)).stdout == b"well\n"


@pytest.mark.parametrize("kind", MEMORY)
async def test_memory_is_there_outside(tmp_path, kind):
  arguments = MEMORY[kind]
  done = await probe_outside("resources.fill_memory", arguments, tmp_path)
  assert done == ["all at once"]
