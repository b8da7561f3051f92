"""Escape probes: what the kernel can be asked for.

It stands alone (the standard library only) and is run by path, inside a sandbox
or, to see that a probe can succeed at all, outside of one:

  python kernel.py NAME '{"argument": ...}'

A probe prints, as a JSON list, what it managed to do: nothing, in a sandbox
that holds. Arguments name things outside, put there by whoever runs it.
Even where they succeed, they change nothing.
"""

import contextlib
import ctypes
import errno
import glob
import json
import mmap
import os
import platform
import signal
import socket
import struct
import sys
import time

_X86 = platform.machine() == "x86_64"
_libc = ctypes.CDLL(None, use_errno=True)
# By name: the numbers on x86_64 and on aarch64.
_CALLS = {
  "mount": (165, 40),
  "umount2": (166, 39),
  "pivot_root": (155, 41),
  "chroot": (161, 51),
  "open_tree": (428, 428),
  "fsopen": (430, 430),
  "mount_setattr": (442, 442),
  "unshare": (272, 97),
  "setns": (308, 268),
  "clone": (56, 220),
  "clone3": (435, 435),
  "ptrace": (101, 117),
  "process_vm_readv": (310, 270),
  "bpf": (321, 280),
  "perf_event_open": (298, 241),
  "userfaultfd": (323, 282),
  "io_uring_setup": (425, 425),
  "add_key": (248, 217),
  "keyctl": (250, 219),
  "init_module": (175, 105),
  "finit_module": (313, 273),
  "kexec_load": (246, 104),
  "reboot": (169, 142),
  "swapoff": (168, 225),
  "clock_settime": (227, 112),
  "settimeofday": (164, 170),
  "sethostname": (170, 161),
}
# A call that ends so was stopped at the door; whatever else it says, it was
# let in, to be found wanting there.
_STOPPED = (errno.EPERM, errno.EACCES, errno.ENOSYS)
_NEWUSER, _NEWNS = 0x10000000, 0x00020000


def _call(name, *arguments):
  """A system call; its result and errno, 0 if it succeeded."""
  ctypes.set_errno(0)
  number = _CALLS[name][0 if _X86 else 1]
  converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
  result = _libc.syscall(ctypes.c_long(number), *converted)
  return result, ctypes.get_errno() if result < 0 else 0


def _let_in(calls):
  """Of calls by name and arguments, those that were not stopped."""
  return [
    name for name, *args in calls if _call(name, *args)[1] not in _STOPPED
  ]


def _in_child(action):
  """Whether an action in a process of its own returns true."""
  pid = os.fork()
  if pid == 0:
    code = 1
    try:
      code = 0 if action() else 1
    except OSError:
      pass
    finally:
      os._exit(code)
  return os.waitpid(pid, 0)[1] == 0


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


def open_odd_sockets():
  """Opens sockets that see raw packets, the hypervisor or the kernel."""
  kinds = {
    "raw": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "packet": (17, socket.SOCK_RAW, 0),
    "vsock": (40, socket.SOCK_STREAM, 0),
    "alg": (38, socket.SOCK_SEQPACKET, 0),
    "key": (15, socket.SOCK_RAW, 2),
    "xdp": (44, socket.SOCK_RAW, 0),
    "netfilter": (16, socket.SOCK_RAW, 12),
    "audit": (16, socket.SOCK_RAW, 9),
    "bluetooth": (31, socket.SOCK_RAW, 1),
  }
  return _possible(
    (name, lambda k=kind: socket.socket(*k).close())
    for name, kind in kinds.items()
  )


def mount_things():
  """Mounts, unmounts, changes the root; run it in a mount namespace."""
  with open("/proc/self/mountinfo") as file:
    point = file.readline().split()[4].encode()
  calls = [
    ("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    ("mount", b"/", b"/tmp", None, 4096, None),
    ("mount", None, b"/", None, 32 | 4096, None),
    ("umount2", b"/tmp", 2),
    ("umount2", point, 2),
    ("pivot_root", b".", b"."),
    ("open_tree", -100, b"/", 1),
    ("fsopen", b"tmpfs", 0),
    ("mount_setattr", -100, b"/", 0, b"\0" * 32, 32),
  ]
  managed = _let_in(calls)
  if _in_child(lambda: _call("chroot", b"/")[1] == 0):
    managed.append("chroot")
  return managed


def make_namespaces():
  """Makes or enters namespaces, where capabilities come for nothing."""
  managed = []
  for name, flags in (("user", _NEWUSER), ("mount", _NEWNS)):
    if _in_child(lambda f=flags: _call("unshare", f)[1] == 0):
      managed.append(f"unshare {name}")
  both = _NEWUSER | signal.SIGCHLD
  pid, _ = _call("clone", both, None, None, None, None)
  if pid == 0:
    os._exit(0)
  if pid > 0:
    os.waitpid(pid, 0)
    managed.append("clone")
  arguments = struct.pack("=8Q", _NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
  pid, _ = _call("clone3", arguments, len(arguments))
  if pid == 0:
    os._exit(0)
  if pid > 0:
    os.waitpid(pid, 0)
    managed.append("clone3")
  for path in glob.glob("/proc/[0-9]*/ns/net")[:3]:
    with contextlib.suppress(OSError), open(path) as file:
      number = file.fileno()
      if _in_child(lambda n=number: _call("setns", n, 0)[1] == 0):
        managed.append(path)
  return managed


def trace_processes():
  """Traces a child, and reads another process's memory."""
  managed = []
  if _in_child(lambda: _call("ptrace", 0, 0, 0, 0)[1] == 0):
    managed.append("ptrace")
  data = ctypes.create_string_buffer(8)
  vector = struct.pack("=QQ", ctypes.addressof(data), 8)
  if _call("process_vm_readv", os.getpid(), vector, 1, vector, 1, 0)[1] == 0:
    managed.append("process_vm_readv")
  return managed


def load_bpf():
  """Makes a map for programs that would run in the kernel."""
  made = struct.pack("=4I", 2, 4, 4, 1) + bytes(112)
  return _let_in([("bpf", 0, made, len(made))])


def use_io_uring():
  """Sets up a ring for asynchronous calls, which a filter does not see."""
  return _let_in([("io_uring_setup", 4, bytes(120))])


def use_perf():
  """Counts the cycles of this very process."""
  attributes = struct.pack("=IIQ", 1, 112, 1) + bytes(96)
  return _let_in([("perf_event_open", attributes, 0, -1, -1, 0)])


def use_userfaultfd():
  """Handles page faults, a help in races against the kernel."""
  return _let_in([("userfaultfd", 1)])


def use_keyring():
  """Leaves a key with the kernel."""
  key = ("add_key", b"user", b"probe", b"x", 1, -3)
  return _let_in([key, ("keyctl", 0, -3, 1)])


def set_clock():
  """Sets the clock to what it shows."""
  now = time.time()
  spec = struct.pack("=qq", int(now), int(now % 1 * 1e9))
  return _let_in([("clock_settime", 0, spec), ("settimeofday", None, bytes(8))])


def change_kernel():
  """Loads a module and a kernel, neither of which is one; reboots wrongly."""
  return _let_in(
    [
      ("init_module", b"no module", 9, b""),
      ("finit_module", 0, b"", 0),
      ("kexec_load", 0, 99, None, 0),
      ("reboot", 0, 0, 0, None),
      ("swapoff", b"/nowhere"),
      ("sethostname", b"x" * 65, 65),
    ]
  )


def use_foreign_calls():
  """Calls the kernel as an i386 program, by other numbers."""
  if not _X86:
    return []

  def call():
    code = bytes.fromhex("b814000000cd80c3")  # mov eax, getpid; int 0x80; ret
    memory = mmap.mmap(-1, 4096, prot=7)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid()

  return ["int 0x80"] if _in_child(call) else []


if __name__ == "__main__":
  arguments = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
  print(json.dumps(globals()[sys.argv[1]](**arguments)))
