"""Trains, with everything in one process.

python -m launch.train --config=experiments/word_problems_smollm2.py
  --workdir=runs/mine    where the run lives; an existing run is continued
  --config.steps=3       any value of the configuration can be overridden
"""

from launch import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir()


def main(argv):
  del argv
  from launch import local  # JAX is imported only once the flags are good

  values = _CONFIG.value.to_dict()
  local.LocalRun(values, _WORKDIR.value or f"runs/{values['name']}").train()


if __name__ == "__main__":
  cli.run(main)
