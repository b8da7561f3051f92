"""A white-box ReAct agent: reply, act, observe, until the environment ends.

It speaks Chat Completions through the `openai` client and knows nothing else:
no tokens, no sampling values, no seeds. Those are the session's business. What
of the conversation the model is shown is `context`'s.
"""

from collections.abc import Awaitable, Callable
import dataclasses

import openai

from forge_jax import types
from forge_jax.agents import base
from forge_jax.agents import context as context_lib
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
    context: context_lib.ContextConfig | None = None,
  ):
    """Prepares the agent.

    Args:
      config: its limits.
      http: any HTTP client that `openai` takes, still its owner's to close;
        by default the agent has one of its own.
      context: how the context is managed; None: not at all.
    """
    self._config = config or ReactConfig()
    self._context = context or context_lib.ContextConfig()
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
    context = context_lib.Context(self._context, environment.reset())
    ask = self._asking(environment, endpoint, context)
    for _ in range(self._config.max_turns):
      reply, used = await ask(context.shown)
      context.add_reply(reply, used)
      rest, note = context.take_action(reply)
      observations: types.Messages | None = ()
      if note is None or rest.get("tool_calls"):
        observations = await base.respond(environment, rest)
      if observations is None:
        break
      context.add_observations(observations)
      if note is not None:
        context.clear(note)
      elif context.wants_summary:
        summary, _ = await ask([*context.shown, context.question])
        context.add_summary(summary)
    return context.transcript

  def _asking(
    self,
    environment: tasks_base.Environment,
    endpoint: base.Endpoint,
    context: context_lib.Context,
  ) -> Callable[[types.Messages], Awaitable[tuple[types.Message, int]]]:
    """What gets a reply to messages, and the tokens that both take."""
    name = endpoint.sub_agent
    client = self._client.with_options(
      api_key=endpoint.api_key,
      base_url=endpoint.base_url,
      default_headers={} if name is None else {base.SUB_AGENT_HEADER: name},
    )
    tools = [dict(tool) for tool in (*environment.tools, *context.tools)]

    async def ask(messages: types.Messages) -> tuple[types.Message, int]:
      completion = await client.chat.completions.create(
        model=endpoint.model,
        messages=messages,
        max_tokens=endpoint.max_tokens,
        tools=tools or openai.omit,
      )
      usage = completion.usage
      used = usage.total_tokens if usage is not None else 0
      return completion.choices[0].message.to_dict(), used

    return ask

  async def aclose(self) -> None:
    """Closes the connections, if they are the agent's own."""
    if self._owns_http:
      await self._http.aclose()
