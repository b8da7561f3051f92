"""Rolls out groups for a trainer elsewhere, through a shared pool; needs no JAX.

FORGE_ADMIN_TOKEN=... python -m launch.rollout
  --workdir=/shared/runs/mine       of the run, whose config.json names the pool
  --gateway=http://trainer:8080     where its agents reach the model
  --host=a                          this host's name; host and process by default
"""

import asyncio

from absl import app, flags

from launch import cli

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run, on a path that the hosts share."
)
_GATEWAY = flags.DEFINE_string("gateway", None, "URL of a gateway.")
_HOST = flags.DEFINE_string("host", "", "Unique name of this host.")
_CA_FILE = flags.DEFINE_string(
  "ca_file", None, "PEM file of the authority behind the gateway's certificate."
)


def main(argv):
  del argv
  from launch import rollout_service  # only once the flags are good

  service = rollout_service.RolloutService(
    _WORKDIR.value, _GATEWAY.value, _HOST.value, _CA_FILE.value
  )
  asyncio.run(service.run())


def run():
  """Parses the flags and runs until a signal ends it."""
  flags.mark_flags_as_required(["workdir", "gateway"])
  app.run(cli.guarded(main))


if __name__ == "__main__":
  run()
