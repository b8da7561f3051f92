"""A white-box ReAct agent: reply, act, observe, until the environment ends.

It speaks Chat Completions through the `openai` client and knows nothing else:
no tokens, no sampling values, no seeds. Those are the session's business.
"""

import dataclasses
from typing import Any

import openai

from forge_jax import types
from forge_jax.agents import base
from forge_jax.tasks import base as tasks_base

# The rollout host's deadline ends an episode; the client must not, before it.
_TIMEOUT = openai.Timeout(3600.0, connect=60.0)


@dataclasses.dataclass(frozen=True, slots=True)
class ReactConfig:
  """Configures the agent."""

  max_turns: int = 8  # most assistant messages of an episode


class ReactAgent:
  """Plays episodes, any number at a time, over one pool of connections."""

  def __init__(
    self,
    config: ReactConfig | None = None,
    http: openai.DefaultAsyncHttpxClient | None = None,
  ):
    """Prepares the agent.

    Args:
      config: its limits.
      http: any HTTP client that `openai` takes, still its owner's to close;
        by default the agent has one of its own.
    """
    self._config = config or ReactConfig()
    # aiohttp's transport stays fast with many connections at once. A proxy in
    # the environment is for the way out, not for the way to a gateway.
    self._http = http or openai.DefaultAioHttpClient(
      timeout=_TIMEOUT, trust_env=False
    )
    self._owns_http = http is None
    # A client per episode would build connections anew: each takes a copy.
    self._client = openai.AsyncOpenAI(
      api_key="replaced-in-every-episode",
      base_url="http://replaced-in-every-episode",
      http_client=self._http,
      max_retries=0,
      timeout=_TIMEOUT,
    )

  async def run(
    self, environment: tasks_base.Environment, endpoint: base.Endpoint
  ) -> types.Messages:
    """Plays one episode; returns the transcript.

    Raises:
      openai.OpenAIError: the endpoint is unreachable or refuses a request.
    """
    client = self._client.with_options(
      api_key=endpoint.api_key, base_url=endpoint.base_url
    )
    messages: list[dict[str, Any]] = [dict(m) for m in environment.reset()]
    tools = [dict(tool) for tool in environment.tools]
    for _ in range(self._config.max_turns):
      completion = await client.chat.completions.create(
        model=endpoint.model,
        messages=messages,
        max_tokens=endpoint.max_tokens,
        tools=tools or openai.omit,
      )
      reply = completion.choices[0].message.to_dict()
      messages.append(reply)
      observations = environment.respond(reply)
      if observations is None:
        break
      messages.extend(dict(m) for m in observations)
    return messages

  async def aclose(self) -> None:
    """Closes the connections, if they are the agent's own."""
    if self._owns_http:
      await self._http.aclose()
