"""The domains by name, and how one is built from its configuration."""

from collections.abc import Mapping
import dataclasses
import importlib
import inspect
from typing import Any

from forge_jax import errors, settings
from forge_jax.agents.sandbox import backends
from forge_jax.tasks import base as tasks_base
from forge_jax.tasks import judge

# Where a domain is: its module is imported only when it is asked for. Beside the
# class `X` stands its configuration, `XConfig`.
DOMAINS = {
  "bug_fixing": "forge_jax.tasks.bug_fixing:BugFixing",
  "deep_search": "forge_jax.tasks.deep_search:DeepSearch",
  "library_qa": "forge_jax.tasks.library_qa:LibraryQA",
  "reasoning": "forge_jax.tasks.reasoning:Reasoning",
  "records": "forge_jax.tasks.records:Records",
  "slow_tools": "forge_jax.tasks.slow_tools:SlowTools",
  "terminal": "forge_jax.tasks.terminal:Terminal",
  "verifiers": "forge_jax.tasks.verifiers:VerifiersDomain",
  "word_problems": "forge_jax.tasks.word_problems:WordProblems",
}


def build(
  name: str,
  values: Mapping[str, Any],
  sandbox: backends.SandboxConfig,
  *,
  seed: int,
) -> tasks_base.Domain:
  """Builds a domain.

  Args:
    name: of DOMAINS, or of a domain of your own.
    values: the section of its configuration. `place` says where one of your own
      is: "package.module:Class".
    sandbox: where a domain that takes a sandbox runs and parses what was
      written by a model.
    seed: of the run.

  Raises:
    ConfigError: there is no such class, or its configuration cannot work.
    SandboxError: it takes a sandbox, and this machine cannot make any.
  """
  values = dict(values)
  place = values.pop("place", DOMAINS.get(name))
  if place is None:
    raise errors.ConfigError(
      f"config.domains.{name} is unknown; known: {sorted(DOMAINS)}; one of your "
      f"own has a `place`"
    )
  domain, config = _find(name, place)
  fields = {field.name for field in dataclasses.fields(config)}
  given = {"seed": seed} if "seed" in fields and "seed" not in values else {}
  section = settings.section(config, values, f"domains.{name}", **given)
  if "sandbox" in inspect.signature(domain).parameters:
    # What scores sees the installed packages; an agent's sandbox does not.
    shown = dataclasses.replace(sandbox, show=(judge.packages(),))
    return domain(section, sandbox=backends.make(shown))
  return domain(section)


def _find(name: str, place: str) -> tuple[type, type]:
  """A domain's class and its configuration's."""
  key = f"domains.{name}"
  config = f"{place.removesuffix('Domain')}Config"  # which stands beside it
  return find(key, place), find(key, config)


def find(key: str, place: str) -> Any:
  """What an experiment names as "package.module:name".

  Raises:
    ConfigError: there is no such thing; `key` says where it was named.
  """
  module_name, _, name = place.partition(":")
  try:
    return getattr(importlib.import_module(module_name), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise errors.ConfigError(
      f"config.{key}: nothing at {place!r}; expected 'module:name': {error}"
    ) from error
