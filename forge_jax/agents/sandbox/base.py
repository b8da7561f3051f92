"""What a sandbox is: a place for programs that nobody vouches for.

A `Backend` opens sandboxes. A sandbox has an empty work directory; files are
put there, commands run there one after another, files are read back. When a
command has ended, by whatever way, none of its processes is left.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Protocol

from forge_jax import errors

MIB = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
  """What the programs of one sandbox may use, all together or each."""

  memory_bytes: int = 2048 * MIB  # together, files included
  processes: int = 128  # together, threads included
  disk_bytes: int = 512 * MIB  # together; files lie in memory
  files: int = 50_000  # together: files and directories
  cpus: float = 1.0  # together; where there are control groups
  cpu_seconds: int = 3600  # of each process
  open_files: int = 1024  # of each process
  output_bytes: int = MIB  # kept of what a command writes, for each stream

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value > 0:
        raise errors.ConfigError(
          f"sandbox {field.name} is {value}; expected more than 0"
        )

  def of_each_process(self) -> dict[str, int]:
    """Resource limits that every backend sets, by their names in `resource`."""
    return {
      "RLIMIT_NOFILE": self.open_files,
      "RLIMIT_CPU": self.cpu_seconds,
      "RLIMIT_FSIZE": self.disk_bytes,
      "RLIMIT_CORE": 0,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
  """How a command ended."""

  code: int  # exit status; -n: signal n ended it
  stdout: bytes  # at most `output_bytes`: the head and the tail
  stderr: bytes  # likewise
  seconds: float  # wall-clock
  timed_out: bool = False  # it was ended at its deadline
  out_of_memory: bool = False  # at least one of its processes was ended for it
  dropped_bytes: int = 0  # of output, between the heads and the tails

  @property
  def failure(self) -> str | None:
    """What went wrong, in a few words; None: the command exited with 0."""
    if self.timed_out:
      return f"timed out after {self.seconds:.1f} seconds"
    if self.out_of_memory and self.code:
      return "out of memory"
    if self.code < 0:
      return f"ended by signal {-self.code}"
    return f"exit status {self.code}" if self.code else None


class Sandbox(Protocol):
  """An open sandbox; used from one asyncio loop, `async with` closes it."""

  @property
  def work(self) -> str:
    """The work directory, as programs in the sandbox see it."""

  @property
  def home(self) -> str:
    """The programs' home directory, likewise."""

  @property
  def gateway(self) -> str | None:
    """The gateway's origin as seen from inside, "http://host:port"."""

  async def put(
    self, files: Mapping[str, bytes], *, executable: bool = False
  ) -> None:
    """Writes files.

    Args:
      files: contents by path, relative to the work directory or absolute.
      executable: whether they may be run.

    Raises:
      SandboxError: a file cannot be written, or the sandbox has died.
    """

  async def get(
    self,
    patterns: Sequence[str] = ("*",),
    *,
    most_files: int = 1000,
    most_bytes: int = 64 * MIB,
  ) -> dict[str, bytes]:
    """Reads regular files, by path relative to the work directory.

    Args:
      patterns: of which a path must match one; `*` matches `/`, too. Links
        are not followed.
      most_files: more are an error.
      most_bytes: more, of all files together, are an error.

    Raises:
      SandboxError: there are too many, or the sandbox has died.
    """

  async def run(
    self,
    argv: Sequence[str],
    *,
    seconds: float,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
  ) -> Result:
    """Runs a command in the work directory to its end, or to its deadline.

    Args:
      argv: the program, looked up in PATH, and its arguments.
      seconds: wall-clock until all its processes are ended.
      env: variables beside the few that a sandbox sets.
      stdin: what it can read.

    Raises:
      SandboxError: it cannot be started, or the sandbox has died.
    """

  async def aclose(self) -> None:
    """Ends every process of the sandbox and removes its files."""

  async def __aenter__(self) -> "Sandbox":
    """Returns the sandbox."""

  async def __aexit__(self, *error: object) -> None:
    """Closes the sandbox."""


class Backend(Protocol):
  """Opens sandboxes."""

  async def open(
    self, limits: Limits | None = None, *, gateway: str | None = None
  ) -> Sandbox:
    """Opens an empty sandbox.

    Args:
      limits: of its programs; None: the defaults.
      gateway: origin of the only server that its programs can reach, such as
        "http://127.0.0.1:8080"; None: none at all.

    Raises:
      SandboxError: this machine cannot make one; the message says why.
    """
