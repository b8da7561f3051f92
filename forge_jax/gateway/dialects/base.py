"""What a protocol is to the gateway.

A dialect turns a request's JSON into turns to sample, and the generations of
those turns into the protocol's reply or its stream of events. It knows no HTTP
and no engine; everything a request holds it honours or refuses by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from forge_jax.gateway import generation, render, sessions


class Events(Protocol):
  """Writes the server-sent events of one streamed reply."""

  def delta(self, choice: int, delta: generation.Delta) -> str:
    """The events of a choice's new tokens; empty: nothing to send yet."""

  def end(self) -> str:
    """The events that finish the stream, when every choice is finished."""

  def fail(self, failure: BaseException) -> str:
    """The events of a failure of a stream that has begun."""


class Asked(Protocol):
  """A request that has been read."""

  @property
  def turns(self) -> Sequence[generation.Turn]:
    """What to sample: a turn per choice."""

  @property
  def stream(self) -> bool:
    """Whether the reply is wanted as events."""

  def reply(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> str:
    """The JSON of a finished reply; `choices` align with `turns`."""

  def events(
    self, choices: Sequence[generation.Generation], renderer: render.Renderer
  ) -> Events:
    """The writer of a streamed reply."""


class Dialect(Protocol):
  """One protocol; a module is one."""

  PATH: str  # its route under the base URL, such as "/chat/completions"

  def parse(self, body: Any, session: sessions.Session) -> Asked:
    """Reads a request's JSON.

    Args:
      body: any JSON value.
      session: whose request it is; holds what earlier requests have stored.

    Raises:
      Refusal: something is missing, malformed or not supported; it names the
        parameter.
    """

  def error(self, failure: BaseException) -> tuple[int, Mapping[str, Any]]:
    """The HTTP status and the JSON of a failed request."""
