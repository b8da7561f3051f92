"""Which agent plays a run's episodes, from the section `agent`."""

import contextlib
import dataclasses
import shlex

from forge_jax import errors
from forge_jax.agents import (
  base,
  context,
  mcp_tools,
  orchestrator,
  react,
  scaffold,
  toolbox,
  workspace,
)
from forge_jax.agents.sandbox import backends, ready
from forge_jax.agents.sandbox import base as sandbox_base


@dataclasses.dataclass(frozen=True, slots=True)
class LineupConfig:
  """What an agent is made of, beside `react.ReactConfig`."""

  # Where one of your own is made, "package.module:function"; it gets the run's
  # RolloutSide and an AsyncExitStack, and what follows is its to heed.
  place: str = ""
  # How calls may be written: every task is shown in another scaffold. (): in
  # its own.
  scaffolds: tuple[str, ...] = ()
  helpers: int = 0  # most sub-agents of an episode; 0: nothing is delegated
  helpers_at_once: int = 4
  helper_turns: int = 8  # most assistant messages of a sub-agent
  mcp: tuple[str, ...] = ()  # servers, "name=command with its arguments"

  def __post_init__(self):
    if self.helpers < 0:
      raise errors.ConfigError(
        f"agent.helpers is {self.helpers}; expected at least 0"
      )
    # What is wrong is told when a configuration is read.
    if self.scaffolds:
      scaffold.ScaffoldConfig(formats=self.scaffolds)
    if self.helpers:
      self.orchestrator()
    if self.mcp:
      self.servers()

  def orchestrator(self) -> orchestrator.OrchestratorConfig:
    """How many sub-agents."""
    return orchestrator.OrchestratorConfig(
      parallel=self.helpers_at_once, most=self.helpers
    )

  def servers(self) -> mcp_tools.McpConfig:
    """The MCP servers.

    Raises:
      ConfigError: one has no name of its own, or no command.
    """
    servers = []
    for text in self.mcp:
      name, _, command = text.partition("=")
      try:
        words = tuple(shlex.split(command))
      except ValueError:  # a quotation without an end
        words = ()
      if not name or not words:
        raise errors.ConfigError(
          f"agent.mcp has {text!r}; expected 'name=command'"
        )
      servers.append(mcp_tools.Server(name, words))
    return mcp_tools.McpConfig(tuple(servers))


@dataclasses.dataclass(frozen=True)
class Lineup:
  """What the agents of a run are made from."""

  config: LineupConfig
  react: react.ReactConfig
  context: context.ContextConfig
  sandbox: backends.SandboxConfig
  tools: toolbox.ToolboxConfig
  seed: int  # of the scaffolds

  def __post_init__(self):
    formats = set(self.config.scaffolds) - {scaffold.NATIVE}
    if formats and self.context.strategy in ("truncate", "tool"):
      raise errors.ConfigError(
        f"context.strategy {self.context.strategy!r} works with calls in the "
        f"model's own format; agent.scaffolds has {', '.join(sorted(formats))}"
      )

  def with_strategy(self, strategy: str) -> "Lineup":
    """The same with another strategy of managing the context."""
    changed = dataclasses.replace(self.context, strategy=strategy)
    return dataclasses.replace(self, context=changed)

  def make(
    self, closing: contextlib.AsyncExitStack, *, on_files: bool
  ) -> base.Agent:
    """Makes one, to be used from one asyncio loop.

    Args:
      closing: gets what closes it.
      on_files: whether there is work that is done on files.

    Raises:
      SandboxError: tools need sandboxes, and this machine cannot make any.
    """
    agent = self._asking(self.react, closing)
    if self.config.helpers:
      turns = react.ReactConfig(max_turns=self.config.helper_turns)
      agent = orchestrator.Orchestrator(
        agent, self._asking(turns, closing), self.config.orchestrator()
      )
    if self.config.mcp:
      # Each episode has a way out of its own: none can be opened ahead.
      backend = backends.make(self.sandbox)
      return mcp_tools.McpAgent(agent, backend, self.config.servers())
    if on_files:
      tools = workspace.WorkspaceConfig(self.tools)
      return workspace.WorkspaceAgent(agent, self.sandboxes(closing), tools)
    return agent

  def sandboxes(
    self, closing: contextlib.AsyncExitStack
  ) -> sandbox_base.Backend:
    """What opens agents' sandboxes, some of them ahead.

    Raises:
      SandboxError: this machine cannot make any.
    """
    backend = backends.make(self.sandbox)
    if not self.sandbox.ready:
      return backend
    ahead = ready.Ready(backend, self.sandbox.ready)
    closing.push_async_callback(ahead.aclose)
    return ahead

  def _asking(
    self, config: react.ReactConfig, closing: contextlib.AsyncExitStack
  ) -> base.Agent:
    """An agent that asks the model, in as many scaffolds as there are."""
    agent = react.ReactAgent(config, context=self.context)
    closing.push_async_callback(agent.aclose)
    if not self.config.scaffolds:
      return agent
    return scaffold.ScaffoldAgent(
      agent, scaffold.ScaffoldConfig(self.seed, formats=self.config.scaffolds)
    )
