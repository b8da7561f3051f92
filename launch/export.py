"""Writes a run's newest checkpoint as a Hugging Face folder.

python -m launch.export --checkpoint=runs/word_problems_smollm2 --to=my_model
"""

from absl import app, flags

from launch import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the run.")
_TO = flags.DEFINE_string("to", None, "New folder for the model.")


def main(argv):
  del argv
  from launch import local  # JAX is imported only once the flags are good

  step = local.export_checkpoint(_CHECKPOINT.value, _TO.value)
  print(f"the weights of step {step} are in {_TO.value}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["checkpoint", "to"])
  app.run(cli.guarded(main), flags_parser=cli.parse_flags)
