"""Runs a command in a sandbox, as an agent's would be.

python -m launch.sandbox -- sh -c 'id; ls /; cat /etc/passwd'
  --show=/opt/agent             something more of the machine, read-only
  --gateway=http://host:port    the one server that can be reached
  --seconds=60 --memory_mib=2048 --processes=128

It prints what the command printed, and exits with its status.
"""

import asyncio
import sys

from absl import app, flags

from forge_jax import errors
from forge_jax.agents.sandbox import base, bubblewrap
from launch import cli

_SHOW = flags.DEFINE_multi_string("show", [], "Path that is seen, read-only.")
_GATEWAY = flags.DEFINE_string("gateway", None, "Origin of the gateway.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "Until the command is ended.")
_MEMORY = flags.DEFINE_integer("memory_mib", 2048, "Memory of all processes.")
_PROCESSES = flags.DEFINE_integer("processes", 128, "Processes at a time.")


async def _run(command: list[str]) -> base.Result:
  backend = bubblewrap.Bubblewrap(
    bubblewrap.BubblewrapConfig(show=tuple(_SHOW.value))
  )
  limits = base.Limits(
    memory_bytes=_MEMORY.value * base.MIB, processes=_PROCESSES.value
  )
  async with await backend.open(limits, gateway=_GATEWAY.value) as box:
    return await box.run(command, seconds=_SECONDS.value)


def main(argv):
  if len(argv) < 2:
    raise app.UsageError("expected a command")
  try:
    result = asyncio.run(_run(argv[1:]))
  except errors.ForgeError as e:
    cli.fail(e)
  sys.stdout.buffer.write(result.stdout)
  sys.stderr.buffer.write(result.stderr)
  if result.failure is not None:
    print(f"sandbox: {result.failure}", file=sys.stderr)
    sys.exit(result.code if result.code > 0 else 1)


if __name__ == "__main__":
  app.run(main, flags_parser=cli.parse_flags)
