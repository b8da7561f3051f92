"""Repeats a run's evaluation with its newest checkpoint.

python -m launch.eval --checkpoint=runs/word_problems_smollm2
  --heldout=50 --phrasings=0    other numbers of tasks than the run's
  --context=truncate            the context is managed in another way
"""

import json

from absl import app, flags

from launch import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the run.")
_HELDOUT = flags.DEFINE_integer("heldout", None, "Held-out tasks.")
_PHRASINGS = flags.DEFINE_integer("phrasings", None, "Unseen phrasings.")
_CONTEXT = flags.DEFINE_string("context", None, "Strategy of the context.")


def main(argv):
  del argv
  from launch import local  # JAX is imported only once the flags are good

  counts = {"heldout": _HELDOUT.value, "phrasings": _PHRASINGS.value}
  result = local.evaluate_checkpoint(_CHECKPOINT.value, counts, _CONTEXT.value)
  print(json.dumps(result))


if __name__ == "__main__":
  flags.mark_flag_as_required("checkpoint")
  app.run(cli.guarded(main), flags_parser=cli.parse_flags)
