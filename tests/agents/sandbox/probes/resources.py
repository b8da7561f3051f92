"""Escape probes: more than a share of the machine.

It stands alone (the standard library only) and is run by path, inside a sandbox
or, to see that a probe can succeed at all, outside of one:

  python resources.py NAME '{"argument": ...}'

A probe prints, as a JSON list, what it managed to do: nothing, in a sandbox
that holds. Arguments name things outside, put there by whoever runs it.
"""

import contextlib
import json
import mmap
import os
import signal
import sys
import time


def fork_many(count):
  """Has more processes at a time than it should."""
  children = []
  with contextlib.suppress(OSError):
    while len(children) < count:
      pid = os.fork()
      if pid == 0:
        time.sleep(60)
        os._exit(0)
      children.append(pid)
  for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  return [f"{len(children)} processes"] if len(children) >= count else []


def fill_memory(processes, each, kind):
  """Holds memory in many processes at once; `kind` says which."""

  def hold():
    if kind == "private":
      return bytearray(os.urandom(1)) * each
    if kind == "shared":
      memory = mmap.mmap(-1, each)
      memory.write(b"x" * each)
      return memory
    number = os.memfd_create("probe")
    for _ in range(each // 2**20):
      os.write(number, b"x" * 2**20)
    return number

  reader, writer = os.pipe()
  children = []
  for _ in range(processes):
    pid = os.fork()
    if pid == 0:
      try:
        held = hold()
        os.write(writer, b"1")
        time.sleep(60)
        del held
      finally:
        os._exit(0)
    children.append(pid)
  os.close(writer)
  os.set_blocking(reader, False)
  holding = 0
  while holding < processes and not os.waitpid(-1, os.WNOHANG)[0]:
    with contextlib.suppress(BlockingIOError):
      holding += len(os.read(reader, processes))
    time.sleep(0.02)
  for pid in children:
    with contextlib.suppress(OSError):
      os.kill(pid, signal.SIGKILL)
  return ["all at once"] if holding == processes else []


def fill_disk(folders, each, files):
  """Writes much in few files, then little in many."""
  managed, written = [], 0
  for folder in folders:
    with contextlib.suppress(OSError), open(f"{folder}/big", "wb") as file:
      for _ in range(each // 2**20):
        written += file.write(b"x" * 2**20)
        file.flush()
    with contextlib.suppress(OSError):
      os.unlink(f"{folder}/big")
    if written >= each:
      managed.append(f"{written} bytes in {folder}")
    made = 0
    with contextlib.suppress(OSError):
      for n in range(files):
        os.close(os.open(f"{folder}/{n}.small", os.O_CREAT))
        made += 1
    for n in range(made):
      os.unlink(f"{folder}/{n}.small")
    if made == files:
      managed.append(f"{made} files in {folder}")
    written = 0
  return managed


def leave_daemon(mark):
  """Leaves a process behind that has turned its back on everything."""
  code = "import time; time.sleep(600)"
  command = [sys.executable, "-c", code, mark]
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      signal.signal(signal.SIGHUP, signal.SIG_IGN)
      null = os.open(os.devnull, os.O_RDWR)
      for number in range(3):
        os.dup2(null, number)
      os.closerange(3, 64)
      os.execv(command[0], command)
    os._exit(0)
  os.wait()
  return []


if __name__ == "__main__":
  arguments = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
  print(json.dumps(globals()[sys.argv[1]](**arguments)))
