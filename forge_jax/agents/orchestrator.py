"""Several agents: one that delegates, and sub-agents that it starts.

The main agent has a tool besides its environment's, `delegate(task)`. Each call
starts a sub-agent: a conversation of its own, which opens with the task and
ends with the first reply that calls no tool. That reply is the call's result.
The calls of one reply run at the same time.

Invariants:
  1. All requests go through the episode's one session: a sub-agent's
     conversation is a root of its forest, and its completions are marked as a
     sub-agent's (`Endpoint.sub_agent`), by which trainer/credit.py knows them.
  2. A sub-agent has the environment's tools but not `delegate`; a reply of its
     that calls none is never seen by the environment.
  3. At most `parallel` sub-agents of an episode run at once, and at most `most`
     in all. When the main agent's reply is answered, none is running.
  4. A sub-agent is named by its place among those that were asked for. Its
     requests' seeds derive from that name: what it samples does not depend on
     how fast the others are.
  5. What a call asks for wrongly, and a sub-agent whose model fails, is a
     result to read; what else fails, fails the episode.
"""

import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

import openai

from forge_jax import errors, types
from forge_jax.agents import base, extra_tools
from forge_jax.tasks import base as tasks_base

_NAME = "delegate"
_TOOL = tasks_base.tool(
  _NAME,
  "Gives a part of the work to a helper, who has the same tools, sees only what "
  "you write here, and answers with a report. Several calls at once are worked "
  "on at the same time.",
  {"task": tasks_base.TEXT},
)
_INSTRUCTIONS = (
  "You help another agent with a part of its work. Use your tools to do what it "
  "asks for; then reply, without calling a tool, with what you found."
)


@dataclasses.dataclass(frozen=True, slots=True)
class OrchestratorConfig:
  """How many sub-agents, and what they are told."""

  parallel: int = 4  # most sub-agents of an episode that run at once
  most: int = 16  # of an episode in all
  instructions: str = _INSTRUCTIONS  # a sub-agent's system prompt

  def __post_init__(self):
    if self.parallel < 1 or self.most < 1:
      raise errors.ConfigError(
        f"orchestrator parallel is {self.parallel} and most {self.most}; "
        "expected at least 1"
      )


class Orchestrator:
  """Plays episodes, any number at a time, with sub-agents."""

  def __init__(
    self,
    agent: base.Agent,
    sub_agent: base.Agent,
    config: OrchestratorConfig | None = None,
  ):
    """Gives `agent` the tool; `sub_agent` plays what it delegates.

    Both may be the same `react.ReactAgent`, or have contexts and numbers of
    turns of their own. For work on files the orchestrator is what a
    `workspace.WorkspaceAgent` equips: all then work in one sandbox.
    """
    self._agent = agent
    self._sub_agent = sub_agent
    self._config = config or OrchestratorConfig()

  async def run(
    self, environment: tasks_base.Environment, endpoint: base.Endpoint
  ) -> types.Messages:
    """Plays one episode; returns the transcript.

    After the main agent's messages it has one of the role "sub-agent" for each
    sub-agent: its name, its report, and in `messages` its own transcript.

    Raises:
      openai.OpenAIError: the endpoint fails the main agent.
    """
    helpers = _Helpers(environment, endpoint, self._sub_agent, self._config)
    tool = extra_tools.Tool(_TOOL, helpers.delegate)
    equipped = extra_tools.Equipped(environment, {_NAME: tool})
    messages = await self._agent.run(equipped, endpoint)
    return [*messages, *helpers.transcripts]


class _Helpers:
  """The sub-agents of an episode."""

  def __init__(
    self,
    environment: tasks_base.Environment,
    endpoint: base.Endpoint,
    sub_agent: base.Agent,
    config: OrchestratorConfig,
  ):
    self._environment = environment
    self._endpoint = endpoint
    self._sub_agent = sub_agent
    self._config = config
    self._permits = asyncio.Semaphore(config.parallel)
    self._started = 0
    self._transcripts: dict[int, types.Message] = {}

  @property
  def transcripts(self) -> list[types.Message]:
    """What the sub-agents did, in the order in which they were asked for."""
    return [message for _, message in sorted(self._transcripts.items())]

  async def delegate(self, written: str) -> str:
    """Plays a sub-agent to its end; returns its report."""
    task = _task(written)
    if task is None:
      return 'error: expected {"task": a text}'
    if self._started == self._config.most:
      return f"error: there are no more than {self._config.most} helpers"
    self._started += 1
    number = self._started
    name = f"sub-agent {number}"
    part = _Part(self._environment, self._config.instructions, task)
    messages: types.Messages = ()
    async with self._permits:
      try:
        messages = await self._sub_agent.run(
          part, dataclasses.replace(self._endpoint, sub_agent=name)
        )
        report = part.report
      except openai.OpenAIError as error:
        report = f"error: the helper failed: {error}"
    self._transcripts[number] = {
      "role": "sub-agent",
      "name": name,
      "content": report,
      "messages": [dict(message) for message in messages],
    }
    return report


class _Part:
  """A sub-agent's world: its task, the environment's tools, its report."""

  def __init__(
    self, inner: tasks_base.Environment, instructions: str, task: str
  ):
    self._inner = inner
    self._opening = (
      {"role": "system", "content": instructions},
      {"role": "user", "content": task},
    )
    self.report = "error: the helper came to no end"

  @property
  def tools(self) -> Sequence[types.Message]:
    return self._inner.tools

  def reset(self) -> types.Messages:
    return [dict(message) for message in self._opening]

  async def respond(self, reply: types.Message) -> types.Messages | None:
    if not reply.get("tool_calls"):
      self.report = reply.get("content") or ""
      return None
    return await base.respond(self._inner, reply)

  def rewards(self) -> Sequence[types.Reward]:
    return ()


def _task(written: Any) -> str | None:
  """The task in a call's arguments; None: there is none."""
  try:
    arguments = json.loads(written)
  except (ValueError, TypeError):
    return None
  task = arguments.get("task") if isinstance(arguments, Mapping) else None
  return task if isinstance(task, str) and task.strip() else None
