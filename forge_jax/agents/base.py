"""What an agent is: something that talks to an endpoint about a task."""

import dataclasses
import inspect
from typing import Protocol

from forge_jax import types
from forge_jax.tasks import base

# The header of a sub-agent's requests, with its name.
SUB_AGENT_HEADER = "x-forge-sub-agent"


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
  """Where an agent sends its requests: all it knows of the system."""

  base_url: str  # of an OpenAI-compatible server, ends in "/v1"
  api_key: str
  model: str
  max_tokens: int  # most new tokens of one completion
  # Whose requests these are, as the gateway is told; None: the main agent's.
  sub_agent: str | None = None
  # To post rewards over HTTP, for an agent that scores: where, and the key. What
  # the model writes must see neither.
  reward_url: str = ""
  control_key: str = ""


class Agent(Protocol):
  """A scaffold around the policy."""

  async def run(
    self, environment: base.Environment, endpoint: Endpoint
  ) -> types.Messages:
    """Plays one episode to its end; returns the transcript.

    May raise anything: the rollout host turns it into data on the episode.
    """


async def respond(
  environment: base.Environment, reply: types.Message
) -> types.Messages | None:
  """What an environment answers, be it at once or as a coroutine."""
  observations = environment.respond(reply)
  if inspect.isawaitable(observations):
    observations = await observations
  return observations
