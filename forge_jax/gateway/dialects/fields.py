"""Reads the fields of a request's JSON; a bad one is refused by its name."""

from collections.abc import Container, Sequence
from typing import Any

from forge_jax.gateway import refusal

_REQUIRED = object()
_JSON = {str: "string", bool: "boolean", list: "array", dict: "object"}


def known(
  value: Any, names: Container[str], *, where: str = ""
) -> dict[str, Any]:
  """An object's fields but the null ones; refused if one has no known name."""
  if not isinstance(value, dict):
    raise (
      bad(where, "must be a JSON object")
      if where
      else refusal.Refusal("the body must be a JSON object")
    )
  given = {name: item for name, item in value.items() if item is not None}
  for name in given:
    if name not in names:
      path = f"{where}.{name}" if where else name
      raise bad(path, "this parameter is not supported")
  return given


def field(
  value: dict[str, Any],
  name: str,
  kind: type,
  default: Any = _REQUIRED,
  *,
  where: str = "",
) -> Any:
  """A field of the given type; refused if it is absent with no default."""
  found = value.get(name)
  path = f"{where}.{name}" if where else name
  if found is None:
    if default is _REQUIRED:
      raise bad(path, "is required")
    return default
  if not isinstance(found, kind):
    raise bad(path, f"must be a JSON {_JSON[kind]}, not {found!r:.40}")
  return found


def one_of(
  value: dict[str, Any],
  name: str,
  allowed: Sequence[str],
  default: Any = _REQUIRED,
  *,
  where: str = "",
) -> Any:
  """A string of a fixed set; refused if it is absent with no default."""
  found = field(value, name, str, default, where=where)
  if found is not default and found not in allowed:
    path = f"{where}.{name}" if where else name
    raise bad(path, f"must be one of {list(allowed)}, not {found!r:.40}")
  return found


def number(
  body: dict[str, Any],
  name: str,
  kind: type,
  low: float,
  high: float | None,
) -> Any:
  """A number within bounds, None if absent; refused by name otherwise."""
  value = body.get(name)
  if value is None:
    return None
  number = isinstance(value, int) or (
    kind is float and isinstance(value, float)
  )
  within = number and value >= low and (high is None or value <= high)
  if isinstance(value, bool) or not within:
    word = "an integer" if kind is int else "a number"
    bound = f">= {low}" if high is None else f"from {low} to {high}"
    raise bad(name, f"must be {word} {bound}, not {value!r:.40}")
  return value


def bad(param: str, message: str) -> refusal.Refusal:
  """A refusal that names a parameter."""
  return refusal.Refusal(f"{param}: {message}", param=param)
