"""Makes a small model that imitates its domains' scripts, to begin RL with.

python -m launch.warm_start --config=experiments/records_warm_start.py
  --workdir=runs/mine    where the run lives; an existing run is continued
  --config.scratch.width=64    any value of the configuration can be overridden
  --config.model.path=runs/other/model    goes on from a model that is there

It makes a tokenizer and random weights (WORKDIR/scratch), unless a model is named,
trains them, and leaves WORKDIR/model, a Hugging Face folder, for
--config.model.path.
"""

import pathlib

from launch import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir()


def main(argv):
  del argv
  from launch import local, new_model  # JAX only once the flags are good

  values = _CONFIG.value.to_dict()
  shape = values.pop("scratch")
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{values['name']}")
  scratch, model = workdir / "scratch", workdir / "model"
  if not values["model"]["path"]:
    values["model"]["path"] = str(scratch.absolute())
    if not scratch.exists():
      new_model.write(scratch, values, shape)
  if local.LocalRun(values, str(workdir)).train() and not model.exists():
    local.export_checkpoint(str(workdir), str(model))
    print(f"the model is in {model}")


if __name__ == "__main__":
  cli.run(main)
