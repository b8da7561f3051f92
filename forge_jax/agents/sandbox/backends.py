"""Which backend a run opens its sandboxes with."""

import dataclasses

from forge_jax import errors
from forge_jax.agents.sandbox import base, bubblewrap, containers, unsafe

_PLAIN = ("bubblewrap", "unsafe")


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxConfig:
  """What holds programs that nobody vouches for."""

  # Or the engine of containers; or "unsafe": nothing holds them.
  backend: str = "bubblewrap"
  image: str = ""  # of containers
  show: tuple[str, ...] = ()  # paths that agents see, read-only
  # That wait, open, for the next episode of a run; 0: each is opened for its
  # own, which waits.
  ready: int = 2

  def __post_init__(self):
    if self.ready < 0:
      raise errors.ConfigError(
        f"sandbox.ready is {self.ready}; expected at least 0"
      )
    known = (*_PLAIN, *containers.ENGINES)
    if self.backend not in known:
      raise errors.ConfigError(
        f"sandbox.backend is {self.backend!r}; expected one of "
        f"{', '.join(known)}"
      )
    if (self.backend in containers.ENGINES) != bool(self.image):
      raise errors.ConfigError(
        f"sandbox.image is {self.image!r} and sandbox.backend "
        f"{self.backend!r}; expected an image for containers, and only there"
      )


def make(config: SandboxConfig) -> base.Backend:
  """Looks for what the backend needs.

  Raises:
    SandboxError: this machine cannot make sandboxes.
    ConfigError: something to be shown is not there, or cannot be.
  """
  if config.backend == "unsafe":
    return unsafe.UnsafeProcess()
  if config.backend == "bubblewrap":
    return bubblewrap.Bubblewrap(bubblewrap.BubblewrapConfig(show=config.show))
  return containers.Containers(
    containers.ContainerConfig(
      config.image, engine=config.backend, show=config.show
    )
  )
