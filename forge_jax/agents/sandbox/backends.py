"""Which backend a run opens its sandboxes with."""

import dataclasses

from forge_jax import errors
from forge_jax.agents.sandbox import base, bubblewrap, unsafe


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxConfig:
  """What holds programs that nobody vouches for."""

  backend: str = "bubblewrap"  # or "unsafe": nothing holds them
  show: tuple[str, ...] = ()  # paths that agents see, read-only

  def __post_init__(self):
    if self.backend not in ("bubblewrap", "unsafe"):
      raise errors.ConfigError(
        f"sandbox.backend is {self.backend!r}; expected 'bubblewrap' or "
        "'unsafe'"
      )


def make(config: SandboxConfig) -> base.Backend:
  """Looks for what the backend needs.

  Raises:
    SandboxError: this machine cannot make sandboxes.
  """
  if config.backend == "unsafe":
    return unsafe.UnsafeProcess()
  return bubblewrap.Bubblewrap(bubblewrap.BubblewrapConfig(show=config.show))
