"""Trains, with everything in one process.

python -m launch.train --config=experiments/word_problems_smollm2.py
  --workdir=runs/mine    where the run lives; an existing run is continued
  --config.steps=3       any value of the configuration can be overridden
"""

from absl import app, flags
from ml_collections import config_flags

from launch import cli

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment: a file with get_config()."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of the run; runs/<config.name> by default."
)


def main(argv):
  del argv
  from launch import local  # JAX is imported only once the flags are good

  values = _CONFIG.value.to_dict()
  local.LocalRun(values, _WORKDIR.value or f"runs/{values['name']}").train()


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(cli.guarded(main), flags_parser=cli.parse_flags)
