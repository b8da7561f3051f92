"""The rewards of a session, which its scorer has posted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forge_jax import types
from forge_jax.gateway import records, refusal


class Rewards:
  """In the order in which they were posted."""

  def __init__(self, log: Callable[[Mapping[str, Any]], None]):
    """Begins without any; what is added is told to `log`."""
    self.all: list[types.Reward] = []
    self._log = log
    self._keyed: dict[str, list[types.Reward]] = {}

  def add(self, given: Sequence[types.Reward], key: str | None = None) -> None:
    """Adds rewards; with a key, those that were given under it only once.

    Raises:
      Refusal: other rewards were given under that key; status 422.
    """
    if key is not None and key in self._keyed:
      if self._keyed[key] != list(given):
        raise refusal.Refusal(
          f"other rewards were posted under the Idempotency-Key {key!r:.80}",
          status=422,
        )
      return
    self._log(records.rewards(given, key))
    self.all += given
    if key is not None:
      self._keyed[key] = list(given)
