"""Between an experiment's configuration and the components' dataclasses.

Each section of a configuration holds fields of one component's dataclass (or
of two, where a user would look for them in one place). Only launch/ turns
sections into dataclasses; experiments/ turns dataclasses into sections.
"""

from collections.abc import Collection, Mapping
import dataclasses
import difflib
from typing import Any

from forge_jax import errors


def check_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
  """Checks that a configuration has these keys and no others.

  Raises:
    ConfigError: a key is unknown or missing.
  """
  for key in sorted(set(values) ^ set(known)):
    state = "unknown" if key in values else "missing"
    raise errors.ConfigError(f"config.{key} is {state}")


def section[T](
  cls: type[T], values: Mapping[str, Any], name: str, **given: Any
) -> T:
  """Builds a component's dataclass from a section of the configuration.

  Args:
    cls: a dataclass.
    values: the section; its keys must be fields of `cls`.
    name: the section's name, for error messages.
    **given: fields that the section does not hold.

  Raises:
    ConfigError: an unknown key, naming the nearest field.
  """
  [part] = shared_section(values, name, (cls, given))
  return part


def shared_section(
  values: Mapping[str, Any], name: str, *parts: tuple[type, Mapping[str, Any]]
) -> list[Any]:
  """Builds several components' dataclasses from the section they share.

  Args:
    values: the section; each key must be a field of one of the parts.
    name: the section's name, for error messages.
    *parts: dataclasses, each with the fields that the section does not hold.

  Raises:
    ConfigError: an unknown key, naming the nearest field.
  """
  fields = [
    {field.name for field in dataclasses.fields(cls)} - given.keys()
    for cls, given in parts
  ]
  known = set().union(*fields)
  for key in values:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise errors.ConfigError(f"config.{name} has no key {key!r}{hint}")
  plain = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in values.items()
  }
  return [
    cls(**{k: v for k, v in plain.items() if k in mine}, **given)
    for (cls, given), mine in zip(parts, fields, strict=True)
  ]


def defaults(cls: type, *without: str, **changes: Any) -> dict[str, Any]:
  """A section with a dataclass's defaults, some left out, some changed."""
  values = {}
  for field in dataclasses.fields(cls):
    if field.default is not dataclasses.MISSING:
      values[field.name] = field.default
    elif field.default_factory is not dataclasses.MISSING:
      values[field.name] = field.default_factory()
  values = {key: value for key, value in values.items() if key not in without}
  return values | changes


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[str]:
  """The keys that two resolved configurations do not agree on."""
  found = []
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      found += differences(a, b, f"{prefix}{key}.")
    elif _plain(a) != _plain(b):
      found.append(f"{prefix}{key}: {a!r} -> {b!r}")
  return found


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
