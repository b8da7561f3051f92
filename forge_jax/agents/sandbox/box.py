"""The host's side of a sandbox: it asks the guest, and ends it in the end.

Invariants:
  1. One request is under way at a time. A request that is cancelled, or whose
     reply does not come or makes no sense, costs the sandbox its life.
  2. The guest is trusted with nothing: a reply is bounded, and parsed as what a
     hostile program may have written.
  3. When `aclose` returns, the sandbox's processes have ended.
"""

import asyncio
from collections.abc import (
  AsyncIterator,
  Awaitable,
  Callable,
  Iterator,
  Mapping,
  Sequence,
)
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import struct
import tempfile
from typing import Any

from forge_jax import errors
from forge_jax.agents.sandbox import base, cgroup

GUEST = pathlib.Path(__file__).with_name("guest.py")
# The port, inside, of the way to the gateway.
GATEWAY_PORT = 8114
GATEWAY_SOCKET = "/run/gateway.sock"

_LENGTHS = struct.Struct(">II")
_MOST_JSON = 16 * base.MIB
_START_SECONDS = 60.0
_FILES_SECONDS = 120.0  # for files to go in or out
_GRACE_SECONDS = 10.0  # for a guest to end what it runs, and to say so
_MOST_STDERR = 4096
# What reading a reply raises that no guest of ours would send.
_NONSENSE = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


@dataclasses.dataclass(frozen=True, slots=True)
class GuestConfig:
  """What a guest is told as it starts; see `guest.Guest`."""

  work: str
  env: Mapping[str, str]
  output_bytes: int
  rlimits: Mapping[str, int]
  watch_memory: int  # bytes that end a command; 0: something else watches
  forward: Mapping[str, Any] | None  # port and path of the gateway's socket
  # Of system calls, in hexadecimal, for commands; "": there is one already.
  seccomp: str = ""

  def to_json(self) -> str:
    """As the guest reads it."""
    return json.dumps(dataclasses.asdict(self))


class Box:
  """An open sandbox, whatever kind of process its guest is."""

  def __init__(
    self,
    process: asyncio.subprocess.Process,
    *,
    work: str,
    home: str,
    gateway: str | None,
    limits: base.Limits,
    group: cgroup.Group | None = None,
    on_close: Sequence[Callable[[], Awaitable[None] | None]] = (),
  ):
    """Takes over a process that becomes the guest; see `open_box`."""
    self.work = work
    self.home = home
    self.gateway = gateway
    self._process = process
    self._limits = limits
    self._group = group
    self._on_close = on_close
    self._lock = asyncio.Lock()
    self._dead: str | None = None  # why, if it is
    self._closing: asyncio.Task | None = None

  async def start(self) -> None:
    """Waits until the guest serves.

    Raises:
      SandboxError: it does not; the message has what it wrote.
    """
    await self._exchange(self._receive(0), _START_SECONDS, "starting")

  async def put(
    self, files: Mapping[str, bytes], *, executable: bool = False
  ) -> None:
    """Writes files; see `base.Sandbox`."""
    sizes = [(path, len(data)) for path, data in files.items()]
    request = {"op": "put", "files": sizes, "executable": executable}
    async with self._turn():
      await self._ask(request, b"".join(files.values()), 0, _FILES_SECONDS)

  async def get(
    self,
    patterns: Sequence[str] = ("*",),
    *,
    most_files: int = 1000,
    most_bytes: int = 64 * base.MIB,
  ) -> dict[str, bytes]:
    """Reads files; see `base.Sandbox`."""
    request = {
      "op": "get",
      "patterns": list(patterns),
      "most_files": most_files,
      "most_bytes": most_bytes,
    }
    async with self._turn():
      reply, data = await self._ask(request, b"", most_bytes, _FILES_SECONDS)
    with self._reading("get"):
      found, start = {}, 0
      for path, size in reply["files"]:
        found[str(path)] = data[start : start + size]
        start += size
      return found

  async def run(
    self,
    argv: Sequence[str],
    *,
    seconds: float,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
  ) -> base.Result:
    """Runs a command; see `base.Sandbox`."""
    request = {
      "op": "run",
      "argv": list(argv),
      "env": dict(env or {}),
      "seconds": seconds,
    }
    async with self._turn():
      kills = self._group.kills() if self._group else 0
      reply, data = await self._ask(
        request, stdin, 2 * self._limits.output_bytes, seconds + _GRACE_SECONDS
      )
      killed = bool(self._group) and self._group.kills() > kills
    with self._reading("run"):
      cut = reply["stdout_bytes"]
      return base.Result(
        code=int(reply["code"]),
        stdout=data[:cut],
        stderr=data[cut:],
        seconds=float(reply["seconds"]),
        timed_out=bool(reply.get("timed_out")),
        out_of_memory=killed or bool(reply.get("out_of_memory")),
        dropped_bytes=int(reply["dropped_bytes"]),
      )

  async def aclose(self) -> None:
    """Ends the sandbox; may be called again."""
    if self._closing is None:
      self._dead = self._dead or "it is closed"
      self._closing = asyncio.create_task(self._close())
    # Whoever waits may be cancelled; the end still comes.
    await asyncio.shield(self._closing)

  async def __aenter__(self) -> "Box":
    """Returns the sandbox."""
    return self

  async def __aexit__(self, *error: object) -> None:
    """Closes the sandbox."""
    await self.aclose()

  @contextlib.asynccontextmanager
  async def _turn(self) -> AsyncIterator[None]:
    """Waits until no request is under way, and keeps it so."""
    async with self._lock:
      if self._dead:
        raise errors.SandboxError(f"the sandbox cannot be used: {self._dead}")
      yield

  async def _ask(
    self, request: dict[str, Any], payload: bytes, most: int, seconds: float
  ) -> tuple[dict[str, Any], bytes]:
    async def exchange() -> tuple[dict[str, Any], bytes]:
      text = json.dumps(request).encode()
      stdin = self._process.stdin
      stdin.write(_LENGTHS.pack(len(text), len(payload)) + text)
      stdin.write(payload)
      await stdin.drain()
      return await self._receive(most)

    reply, data = await self._exchange(exchange(), seconds, request["op"])
    if "error" in reply:
      raise errors.SandboxError(f"{request['op']}: {reply['error']}")
    return reply, data

  async def _exchange(
    self,
    exchange: Awaitable[tuple[dict[str, Any], bytes]],
    seconds: float,
    what: str,
  ) -> tuple[dict[str, Any], bytes]:
    """Waits for an exchange; what goes wrong ends the sandbox."""
    self._dead = f"{what} was interrupted"
    try:
      async with asyncio.timeout(seconds):
        reply = await exchange
    except (asyncio.IncompleteReadError, OSError, *_NONSENSE) as error:
      self._dead = f"{what}: {await self._last_words(error)}"
      raise errors.SandboxError(self._dead) from error
    self._dead = None
    return reply

  @contextlib.contextmanager
  def _reading(self, what: str) -> Iterator[None]:
    """What makes no sense in a reply ends the sandbox."""
    try:
      yield
    except _NONSENSE as error:
      self._dead = f"{what}: a reply that makes no sense: {error!r}"
      raise errors.SandboxError(self._dead) from error

  async def _receive(self, most: int) -> tuple[dict[str, Any], bytes]:
    """Reads a reply, with at most `most` bytes behind its JSON."""
    stdout = self._process.stdout
    size, payload = _LENGTHS.unpack(await stdout.readexactly(_LENGTHS.size))
    if size > _MOST_JSON or payload > most:
      raise ValueError(f"a reply of {size} and {payload} bytes")
    reply = json.loads(await stdout.readexactly(size))
    if not isinstance(reply, dict):
      raise TypeError(f"a reply that is a {type(reply).__name__}")
    return reply, await stdout.readexactly(payload)

  async def _last_words(self, error: Exception) -> str:
    """What the process wrote as it ended, or else the error."""
    if isinstance(error, TimeoutError):
      return "no answer in time"
    if self._group is not None and self._group.kills():
      return "out of memory"
    said = b""
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(_GRACE_SECONDS):
        said = await self._process.stderr.read(_MOST_STDERR)
    if said:
      return said.decode(errors="replace").strip()
    return f"the process ended ({type(error).__name__}: {error})"

  async def _close(self) -> None:
    # Asked to end, the guest is waited for by bubblewrap, and bubblewrap by
    # us: nothing is left then. Killing bubblewrap kills the guest, too, but
    # only its closed stdout tells when.
    self._process.stdin.close()
    try:
      async with asyncio.timeout(_GRACE_SECONDS / 10):
        await self._process.wait()
    except TimeoutError:
      with contextlib.suppress(ProcessLookupError):
        self._process.kill()
      if self._group is not None:
        self._group.kill()
      await self._process.wait()
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(_GRACE_SECONDS):
        while await self._process.stdout.read(65536):
          pass
    if self._group is not None:
      await self._remove_group()
    for action in self._on_close:
      waiting = action()
      if waiting is not None:
        await waiting

  async def _remove_group(self) -> None:
    for _ in range(500):
      if self._group.remove():
        return
      self._group.kill()
      await asyncio.sleep(0.01)


def make_folder(prefix: str) -> str:
  """A directory for one sandbox of this process, in the temporary directory.

  Those that processes which are no more have left are removed.
  """
  for path in pathlib.Path(tempfile.gettempdir()).glob(f"{prefix}-*-*"):
    owner = path.name.removeprefix(prefix).split("-")[1]
    if not os.path.exists(f"/proc/{owner}"):
      shutil.rmtree(path, ignore_errors=True)
  return tempfile.mkdtemp(prefix=f"{prefix}-{os.getpid()}-")


async def open_box(box: Box) -> Box:
  """Starts a box; closes it if that fails or is cancelled."""
  try:
    await box.start()
  except BaseException:
    await box.aclose()
    raise
  return box
