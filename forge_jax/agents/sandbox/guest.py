"""The inside of a sandbox: its first process, which does what the host asks.

It stands alone: the standard library only, and it is run by path.

Invariants:
  1. Requests come on stdin, replies go to stdout, one at a time, each framed as
     two big-endian lengths, a JSON object and raw bytes. When stdin ends, so
     does this process; being process 1 of its namespace, it takes every other
     process with it.
  2. As process 1 it cannot be killed or stopped from inside, and as it is not
     dumpable, nobody inside reads its memory or uses its descriptors.
  3. After a command, whatever became of it, this process has no children.
  4. It holds at most `output_bytes` of each stream of a command.
"""

import contextlib
import ctypes
import fnmatch
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time

_LENGTHS = struct.Struct(">II")
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CHUNK = 65536


class Guest:
  """Serves requests until the host hangs up."""

  def __init__(self, config):
    """Takes the limits and paths of the sandbox; see `box.open_box`."""
    self._config = config
    self._is_init = os.getpid() == 1
    self._wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Not Python's handler: without one, process 1 is sent nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    self._libc = ctypes.CDLL(None, use_errno=True)
    self._libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

  def serve(self):
    """Answers requests, each with a result or with what went wrong."""
    _send({"ready": True})
    while True:
      request, payload = _receive()
      try:
        serve = getattr(self, "op_" + request.pop("op"))
        reply, data = serve(payload, **request)
      except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        reply, data = {"error": f"{error.strerror}:{where}"}, b""
      except ValueError as error:
        reply, data = {"error": str(error)}, b""
      _send(reply, data)

  def op_put(self, payload, files, executable):
    """Writes files: pairs of path and size, with their bytes in a row."""
    start = 0
    for path, size in files:
      path = os.path.join(self._config["work"], path)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(path, "wb") as file:
        file.write(payload[start : start + size])
      if executable:
        os.chmod(path, 0o755)
      start += size
    return {}, b""

  def op_get(self, payload, patterns, most_files, most_bytes):
    """Reads regular files: pairs of path and size, bytes in a row."""
    found, parts, total = [], [], 0
    for path in self._matches(patterns):
      data = _read_regular(path, self._config["work"], most_bytes - total)
      if data is None:
        continue
      total += len(data)
      found.append((path, len(data)))
      parts.append(data)
      if len(found) > most_files or total > most_bytes:
        raise ValueError(
          f"more than {most_files} files or {most_bytes} bytes match "
          f"{', '.join(patterns)}"
        )
    return {"files": found}, b"".join(parts)

  def _matches(self, patterns):
    root = self._config["work"]
    for folder, _, names in os.walk(root):  # which follows no links
      for name in names:
        path = os.path.relpath(os.path.join(folder, name), root)
        if any(fnmatch.fnmatchcase(path, p) for p in patterns):
          yield path

  def op_run(self, payload, argv, env, seconds):
    """Runs a command to its end; the payload is its stdin."""
    started = time.monotonic()
    environment = self._config["env"] | env
    stdin = _spool(payload, environment["TMPDIR"])
    streams = [_Stream(self._config["output_bytes"]) for _ in range(2)]
    try:
      try:
        if self._config["forward"]:
          self._fork_forwarder(**self._config["forward"])
        outputs = [stream.writer for stream in streams]
        pid = self._spawn(argv, environment, stdin, outputs)
        for stream in streams:
          stream.close_writer()
        ended = self._watch(pid, streams, started + seconds)
      finally:
        statuses = self._end_all()
      ended.setdefault("status", statuses.get(pid))
      for stream in streams:
        stream.drain()
      kept = [stream.kept() for stream in streams]
    finally:
      os.close(stdin)
      for stream in streams:
        stream.close()
    reply = {
      "code": os.waitstatus_to_exitcode(ended.pop("status")),
      "seconds": time.monotonic() - started,
      "dropped_bytes": sum(stream.dropped for stream in streams),
      "stdout_bytes": len(kept[0]),
      **ended,
    }
    return reply, b"".join(kept)

  def _spawn(self, argv, env, stdin, outputs):
    """Starts a command; raises what kept it from starting."""
    failed, report = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
      try:
        self._become(argv, env, stdin, outputs)
      except OSError as error:
        os.write(report, error.errno.to_bytes(2))
      finally:
        os._exit(127)
    os.close(report)
    with open(failed, "rb") as file:
      code = file.read()
    if code:
      number = int.from_bytes(code)
      raise OSError(number, os.strerror(number), argv[0])
    return pid

  def _become(self, argv, env, stdin, outputs):
    """Turns a new child into the command; returns only by raising."""
    os.setsid()
    for number, descriptor in enumerate((stdin, *outputs)):
      os.dup2(descriptor, number)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
      signal.signal(number, signal.SIG_DFL)
    # If memory runs out, the command is ended, and not this process. Its own
    # files in /proc belong to a process only if it is dumpable.
    self._libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    with open("/proc/self/oom_score_adj", "w") as file:
      file.write("1000")
    for name, value in self._config["rlimits"].items():
      resource.setrlimit(getattr(resource, name), (value, value))
    self._filter_calls()
    os.chdir(self._config["work"])
    os.execvpe(argv[0], argv, env)

  def _filter_calls(self):
    """Refuses system calls, where whoever started this process has not."""
    code = bytes.fromhex(self._config["seccomp"])
    if not code:
      return
    # struct sock_fprog: how many instructions of eight bytes, and where.
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    if self._libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0):
      raise OSError(ctypes.get_errno(), "the filter of system calls")

  def _fork_forwarder(self, port, path):
    """Starts the way to the gateway; it can be connected to on return."""
    import forward  # here, because few sandboxes pay for it

    listener = forward.listen(port)
    if os.fork() == 0:
      try:
        os.close(0)
        os.close(1)
        forward.serve(listener, path)
      finally:
        os._exit(1)
    listener.close()

  def _watch(self, pid, streams, deadline):
    """Waits for a command's end, its deadline or too much memory."""
    watched = self._config["watch_memory"]
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(self._wake, select.POLLIN)
    for stream in streams:
      poll.register(stream.reader, select.POLLIN)
    by_reader = {stream.reader: stream for stream in streams}
    while True:
      left = deadline - time.monotonic()
      if left <= 0:
        return {"timed_out": True}
      if watched and self._exceeds(watched):
        return {"out_of_memory": True}
      wait = min(left, 0.02) if watched else left
      for descriptor, _ in poll.poll(wait * 1000 + 1):
        if descriptor == 0:
          sys.exit()  # the host is gone, or wants an end
        if descriptor == self._wake:
          os.read(self._wake, _CHUNK)
        elif by_reader[descriptor].read() == b"":
          poll.unregister(descriptor)
      statuses = _reap()
      if pid in statuses:
        return {"status": statuses[pid]}

  def _exceeds(self, most):
    """Whether all processes and files hold more than `most` bytes."""
    import processes  # here, because few sandboxes pay for it

    files = 0
    if self._is_init:  # its files are in memory, and nobody else's
      used = os.statvfs(self._config["work"])
      files = (used.f_blocks - used.f_bfree) * used.f_frsize
    pids = self._processes()
    if files + sum(map(processes.resident, pids)) <= most:
      return False
    # Pages that processes share were counted for each: once more, exactly.
    return files + sum(map(processes.proportional, pids)) > most

  def _processes(self):
    """The sandbox's processes but this one."""
    if self._is_init:
      own = str(os.getpid())
      return [n for n in os.listdir("/proc") if n.isdigit() and n != own]
    import processes

    return processes.descendants(os.getpid())

  def _end_all(self):
    """Ends every process but this one; wait statuses by process id."""
    statuses = {}
    while True:
      for pid in [-1] if self._is_init else self._processes():
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      try:
        pid, status = os.waitpid(-1, 0)
      except ChildProcessError:
        return statuses
      statuses[pid] = status


class _Stream:
  """What a command writes: the first and the last half of what is kept."""

  def __init__(self, most):
    self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(self.reader, False)
    self.dropped = 0
    self._half = (most + 1) // 2
    self._most = most
    self._head = bytearray()
    self._tail = bytearray()

  def read(self):
    """Takes and returns what is there; None: nothing yet, b"": the end."""
    try:
      data = os.read(self.reader, _CHUNK)
    except BlockingIOError:
      return None
    room = max(0, self._half - len(self._head))
    self._head += data[:room]
    self._tail += data[room:]
    excess = len(self._tail) - (self._most - self._half)
    if excess > _CHUNK:  # not every time: this moves the tail
      self._trim(excess)
    return data

  def drain(self):
    """Takes what is left once no writer is."""
    while self.read():
      pass

  def kept(self):
    """The head and the tail."""
    self._trim(len(self._tail) - (self._most - self._half))
    return bytes(self._head + self._tail)

  def _trim(self, excess):
    if excess > 0:
      del self._tail[:excess]
      self.dropped += excess

  def close_writer(self):
    """Leaves the writing to the command."""
    os.close(self.writer)
    self.writer = None

  def close(self):
    """Closes what is open."""
    os.close(self.reader)
    if self.writer is not None:
      os.close(self.writer)


def _reap():
  """Wait statuses of the children that have ended, by process id."""
  statuses = {}
  while True:
    try:
      pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
      return statuses
    if pid == 0:
      return statuses
    statuses[pid] = status


def _read_regular(path, root, most):
  """A regular file's bytes, at most one more than `most`; None: no such."""
  flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
  try:
    descriptor = os.open(os.path.join(root, path), flags)
  except OSError:  # a link, a socket, a file that its owner cannot read
    return None
  with open(descriptor, "rb") as file:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
      return None
    return file.read(most + 1)


def _spool(data, directory):
  """A descriptor that reads the data and then ends."""
  if not data:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
  descriptor = os.open(
    directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600
  )
  with open(descriptor, "wb", closefd=False) as file:
    file.write(data)
  os.lseek(descriptor, 0, os.SEEK_SET)
  return descriptor


def _receive():
  """The next request and its payload; ends the process if there is none."""
  sizes = sys.stdin.buffer.read(_LENGTHS.size)
  if len(sizes) < _LENGTHS.size:
    sys.exit()
  size, payload_size = _LENGTHS.unpack(sizes)
  request = json.loads(sys.stdin.buffer.read(size))
  return request, sys.stdin.buffer.read(payload_size)


def _send(reply, payload=b""):
  data = json.dumps(reply).encode()
  lengths = _LENGTHS.pack(len(data), len(payload))
  sys.stdout.buffer.write(lengths + data + payload)
  sys.stdout.buffer.flush()


if __name__ == "__main__":
  if "__file__" in globals():  # else what it imports is there
    sys.path.append(os.path.dirname(__file__))
  Guest(json.loads(sys.argv[1])).serve()
