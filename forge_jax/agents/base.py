"""What an agent is: something that talks to an endpoint about a task."""

import dataclasses
from typing import Protocol

from forge_jax import types
from forge_jax.tasks import base


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
  """Where an agent sends its requests: all it knows of the system."""

  base_url: str  # of an OpenAI-compatible server, ends in "/v1"
  api_key: str
  model: str
  max_tokens: int  # most new tokens of one completion


class Agent(Protocol):
  """A scaffold around the policy."""

  async def run(
    self, environment: base.Environment, endpoint: Endpoint
  ) -> types.Messages:
    """Plays one episode to its end; returns the transcript.

    May raise anything: the rollout host turns it into data on the episode.
    """
