"""Escape probes: what lies outside of a sandbox.

It stands alone (the standard library only) and is run by path, inside a sandbox
or, to see that a probe can succeed at all, outside of one:

  python reach.py NAME '{"argument": ...}'

A probe prints, as a JSON list, what it managed to do: nothing, in a sandbox
that holds. Arguments name things outside, put there by whoever runs it.
`kill_others` kills what it is told to; the others do no harm.
"""

import contextlib
import fcntl
import glob
import json
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import termios
import time


def _possible(attempts):
  """The names of the attempts that raise no OSError."""
  managed = []
  for name, attempt in attempts:
    try:
      attempt()
    except OSError:
      continue
    managed.append(name)
  return managed


def read_files(paths):
  """Reads what the host's user may read."""
  return _possible((p, lambda p=p: open(p, "rb").read(1)) for p in paths)


def read_environments(secret):
  """Looks for a secret in the environment and memory maps of any process."""
  managed = []
  for path in glob.glob("/proc/[0-9]*/environ") + glob.glob(
    "/proc/[0-9]*/cmdline"
  ):
    with contextlib.suppress(OSError), open(path, "rb") as file:
      if secret.encode() in file.read() and f"/{os.getpid()}/" not in path:
        managed.append(path)
  return managed


def see_others(pids):
  """Looks for processes of the host by their ids and their names."""
  return [pid for pid in pids if os.path.exists(f"/proc/{pid}/status")]


def kill_others(pids):
  """Kills processes of the host: its runner, say."""
  return _possible((p, lambda p=p: os.kill(p, signal.SIGKILL)) for p in pids)


def attack_guest(pid):
  """Stops, kills, reads and impersonates the process that serves the host."""

  def stopped():
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.1)
    with open(f"/proc/{pid}/stat") as file:
      if file.read().rpartition(")")[2].split()[0] == "T":
        return
    raise OSError

  def descriptors():
    if not [os.open(p, os.O_RDWR) for p in glob.glob(f"/proc/{pid}/fd/*")]:
      raise OSError

  return _possible(
    [
      ("stop", stopped),
      ("fd", descriptors),
      ("mem", lambda: open(f"/proc/{pid}/mem", "rb").close()),
      ("root", lambda: os.listdir(f"/proc/{pid}/cwd/")),
      ("environ", lambda: open(f"/proc/{pid}/environ").read()),
    ]
  )


def write_files(directories):
  """Makes files, directories, links and devices where it should not."""
  managed = []
  for folder in directories:
    path = os.path.join(folder, f"probe-{os.getpid()}")
    managed += _possible(
      [
        (folder, lambda p=path: open(p, "x").close()),
        (f"{folder} (link)", lambda p=path: os.symlink("/", p + ".link")),
        (f"{folder} (directory)", lambda p=path: os.mkdir(p + ".d")),
      ]
    )
    for made in glob.glob(path + "*"):
      with contextlib.suppress(OSError):
        (os.rmdir if os.path.isdir(made) else os.unlink)(made)
  return managed


def write_settings(paths):
  """Opens settings of the kernel for writing; writes nothing."""
  return _possible(
    (p, lambda p=p: os.close(os.open(p, os.O_WRONLY))) for p in paths
  )


def connect_tcp(addresses):
  """Connects to pairs of host and port."""
  return _possible(
    (
      f"{host}:{port}",
      lambda a=(host, port): socket.create_connection(a, timeout=1).close(),
    )
    for host, port in addresses
  )


def send_udp(addresses):
  """Sends datagrams to pairs of host and port."""

  def send(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
      made.connect(address)
      made.send(b"probe")

  return _possible((f"{h}:{p}", lambda a=(h, p): send(a)) for h, p in addresses)


def connect_unix(paths, abstract, below, allowed):
  """Connects to socket files, all below a folder too, and abstract names."""

  def connect(address):
    with socket.socket(socket.AF_UNIX) as made:
      made.settimeout(1)
      made.connect(address)

  paths = [*paths]
  for folder, _, names in os.walk(below):
    if folder.startswith(("/proc", "/sys", "/usr")):
      continue
    for name in names:
      path = os.path.join(folder, name)
      with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
          paths.append(path)
  return _possible(
    [
      (address, lambda a=address: connect(a))
      for address in {*paths} - {*allowed}
    ]
    + [(name, lambda n=name: connect("\0" + n)) for name in abstract]
  )


def make_devices():
  """Makes a device node, and opens those of the machine."""
  path = f"/tmp/probe-{os.getpid()}"
  managed = _possible(
    [("mknod", lambda: os.mknod(path, stat.S_IFBLK | 0o600, 0x800))]
  )
  with contextlib.suppress(OSError):
    os.unlink(path)
  usual = ["null", "zero", "full", "random", "urandom", "tty", "ptmx"]
  for path in glob.glob("/dev/*"):
    if os.path.basename(path) not in usual and not os.path.islink(path):
      mode = os.stat(path).st_mode
      if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        managed.append(path)
  return managed


def inject_into_terminals():
  """Types into a terminal, as if its user had."""

  def inject(number):
    fcntl.ioctl(number, termios.TIOCSTI, b"x")

  def inject_into_own():
    pid, leader = pty.fork()
    if pid == 0:
      try:
        inject(0)
        os._exit(0)
      except OSError:
        os._exit(1)
    status = os.waitpid(pid, 0)[1]
    os.close(leader)
    if status:
      raise OSError

  return _possible(
    [(n, lambda n=n: inject(n)) for n in range(3)]
    + [("/dev/tty", lambda: os.close(os.open("/dev/tty", os.O_RDWR)))]
    + [("own", inject_into_own)]
  )


def gain_privileges():
  """Runs programs that would make it another user, and looks for means."""
  managed = []
  with open("/proc/self/status") as file:
    status = dict(line.split(":\t", 1) for line in file if ":\t" in line)
  for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
    if int(status[name], 16):
      managed.append(name)
  if status["NoNewPrivs"].strip() != "1":
    managed.append("privileges can be gained")
  if _possible([("", lambda: os.setuid(0))]):
    managed.append("setuid")
  # The loader heeds this unless the program gains privileges.
  for path in glob.glob("/usr/bin/*"):
    with contextlib.suppress(OSError):
      if os.stat(path).st_mode & stat.S_ISUID:
        done = subprocess.run(
          [path, "--help"],
          env={"LD_SHOW_AUXV": "1"},
          capture_output=True,
          stdin=subprocess.DEVNULL,
          timeout=10,
        )
        if b"AT_SECURE" not in done.stdout or b"AT_EUID: 0" in done.stdout:
          managed.append(path)
  return managed


if __name__ == "__main__":
  arguments = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
  print(json.dumps(globals()[sys.argv[1]](**arguments)))
