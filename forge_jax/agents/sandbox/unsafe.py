"""Ordinary processes behind a sandbox's interface: no isolation whatever.

For programs that are trusted, where bubblewrap cannot be had. A program here
reads and writes what its user can, reaches the network and may leave processes
behind. Held are: the deadline and the memory of well-behaved programs, the size
of what they print, and limits of each process.
"""

import asyncio
import functools
import os
import shutil
import subprocess
import sys

from forge_jax.agents.sandbox import base, box


class UnsafeProcess:
  """Opens directories of their own for processes of this very user."""

  async def open(
    self, limits: base.Limits | None = None, *, gateway: str | None = None
  ) -> box.Box:
    """Opens a directory to run programs in; see `base.Backend`.

    `gateway` is passed on as it is, and everything else can be reached, too.

    Raises:
      SandboxError: the process that runs programs does not start.
    """
    limits = limits or base.Limits()
    folder = box.make_folder("forge-unsafe")
    for name in ("work", "tmp", "home"):
      os.mkdir(os.path.join(folder, name))
    process = await asyncio.create_subprocess_exec(
      sys.executable,
      "-ISB",
      str(box.GUEST),
      _guest_config(folder, limits).to_json(),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )
    opened = box.Box(
      process,
      work=os.path.join(folder, "work"),
      home=os.path.join(folder, "home"),
      gateway=gateway,
      limits=limits,
      on_close=(functools.partial(shutil.rmtree, folder, ignore_errors=True),),
    )
    return await box.open_box(opened)


def _guest_config(folder: str, limits: base.Limits) -> box.GuestConfig:
  python = os.path.dirname(os.path.realpath(sys.executable))
  return box.GuestConfig(
    work=os.path.join(folder, "work"),
    env={
      "PATH": f"{python}:{os.environ.get('PATH', os.defpath)}",
      "HOME": os.path.join(folder, "home"),
      "TMPDIR": os.path.join(folder, "tmp"),
      "LANG": "C.UTF-8",
    },
    output_bytes=limits.output_bytes,
    rlimits=limits.of_each_process(),
    watch_memory=limits.memory_bytes,
    forward=None,
  )
