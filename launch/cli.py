"""What absl mains share: flags, and errors that a user is meant to read."""

from collections.abc import Callable, Sequence
import logging as standard_logging
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from forge_jax import errors

# Read by `transformers` when it is imported: we want its tokenizers, and no
# advice about the frameworks that it does not find.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def define_config() -> flags.FlagHolder:
  """Defines --config: an experiment, of which every value can be overridden."""
  return config_flags.DEFINE_config_file(
    "config", None, "Experiment: a file with get_config()."
  )


def define_workdir() -> flags.FlagHolder:
  """Defines --workdir, where an experiment's run lives."""
  return flags.DEFINE_string(
    "workdir", "", "Folder of the run; runs/<config.name> by default."
  )


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a main that needs --config."""
  flags.mark_flag_as_required("config")
  app.run(guarded(main), flags_parser=parse_flags)


def guarded(
  main: Callable[[Sequence[str]], None],
) -> Callable[[Sequence[str]], None]:
  """A main whose boundary errors end as one line and exit status 1."""

  def run(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step at INFO
    standard_logging.getLogger("forge_jax").setLevel(standard_logging.INFO)
    if len(argv) > 1:
      fail(errors.ConfigError(f"unexpected arguments: {' '.join(argv[1:])}"))
    try:
      main(argv)
    except errors.ForgeError as e:
      fail(e)

  return run


def parse_flags(argv: Sequence[str]) -> Sequence[str]:
  """Parses flags; a misspelt configuration key ends as one line."""
  try:
    return app.parse_flags_with_usage(list(argv))
  except (AttributeError, KeyError, TypeError) as e:
    text = str(e).replace("\\n", " ").replace("\n", " ").strip("\"'")
    fail(errors.ConfigError(f"a --config override cannot be applied: {text}"))


def fail(error: errors.ForgeError) -> None:
  """Prints an error on one line and exits with status 1."""
  print(f"{type(error).__name__}: {error}", file=sys.stderr)
  sys.exit(1)
