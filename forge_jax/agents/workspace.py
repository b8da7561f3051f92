"""A white-box agent that works on files: its tools act in a sandbox.

With the tools `toolbox.TERMINAL` it is a terminal agent, with `toolbox.CODE` a
code agent. It is a ReAct agent around a `tasks.base.Workspace`: the task's
files go into a fresh sandbox, the model calls tools until it replies without a
call, the files come out and are scored. An environment that is no workspace is
played without tools of the agent's.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Protocol

from forge_jax import types
from forge_jax.agents import base, toolbox
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.tasks import base as tasks_base


class WorkspaceEnvironment(
  tasks_base.Environment, tasks_base.Workspace, Protocol
):
  """An environment whose work is done on files."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkspaceConfig:
  """What is worked with."""

  # What of it an environment has no opinion on; None: a terminal agent's.
  tools: toolbox.ToolboxConfig | None = None
  limits: sandbox_base.Limits | None = None  # None: the defaults
  most_files: int = 1000  # that are taken out at the end
  most_bytes: int = 64 * sandbox_base.MIB


class WorkspaceAgent:
  """Plays episodes, any number at a time, each in a sandbox of its own."""

  def __init__(
    self,
    agent: base.Agent,
    backend: sandbox_base.Backend,
    config: WorkspaceConfig | None = None,
  ):
    """Gives an agent tools in sandboxes of a backend.

    The agent is a `react.ReactAgent`, or what is made of such.
    """
    self._agent = agent
    self._backend = backend
    self._config = config or WorkspaceConfig()
    self._tools = self._config.tools or toolbox.ToolboxConfig()

  async def run(
    self,
    environment: WorkspaceEnvironment | tasks_base.Environment,
    endpoint: base.Endpoint,
  ) -> types.Messages:
    """Plays one episode; returns the transcript.

    Raises:
      openai.OpenAIError: the endpoint is unreachable or refuses a request. The
        files count nevertheless.
      SandboxError: the sandbox cannot be made, died, or holds too many files.
    """
    if not isinstance(environment, tasks_base.Workspace):
      return await self._agent.run(environment, endpoint)
    config = self._tools
    if isinstance(environment, tasks_base.Equipped):
      config = dataclasses.replace(config, tools=tuple(environment.toolset))
    async with await self._backend.open(self._config.limits) as box:
      await box.put(environment.files())
      equipped = _Equipped(environment, toolbox.Toolbox(config, box))
      failure = None
      try:
        messages = await self._agent.run(equipped, endpoint)
      except Exception as error:  # raised below: the files count nevertheless
        failure = error
      environment.collect(await self._harvest(box))
      if failure is not None:
        raise failure
    return messages

  async def _harvest(self, box: sandbox_base.Sandbox) -> Mapping[str, bytes]:
    return await box.get(
      most_files=self._config.most_files, most_bytes=self._config.most_bytes
    )


class _Equipped:
  """An environment that answers tool calls with what they did."""

  def __init__(self, inner: WorkspaceEnvironment, box: toolbox.Toolbox):
    self._inner = inner
    self._box = box

  @property
  def tools(self) -> Sequence[types.Message]:
    return self._box.tools

  def reset(self) -> types.Messages:
    return self._inner.reset()

  async def respond(self, reply: types.Message) -> types.Messages | None:
    return await self._box.answer(reply)

  def rewards(self):
    return self._inner.rewards()
