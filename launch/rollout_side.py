"""What rolls out tasks, from a run's configuration; nothing imports JAX."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
from typing import Any

from forge_jax import errors, settings
from forge_jax.agents import base as agents_base
from forge_jax.agents import context, lineup, react, toolbox
from forge_jax.agents.sandbox import backends
from forge_jax.pool import curation, window
from forge_jax.rollout import host, process
from forge_jax.tasks import base as tasks_base
from forge_jax.tasks import curriculum, mixture
from launch import registry


class RolloutSide:
  """Tasks, agent and host of a run; the same in each of its processes."""

  def __init__(self, values: Mapping[str, Any]):
    """Reads a resolved configuration.

    Raises:
      ConfigError: an unknown key, or a value that cannot work.
    """
    self.seed = values["seed"]
    config, playing = settings.shared_section(
      values["agent"],
      "agent",
      (lineup.LineupConfig, {}),
      (react.ReactConfig, {}),
    )
    self.lineup = lineup.Lineup(
      config,
      playing,
      settings.section(context.ContextConfig, values["context"], "context"),
      settings.section(backends.SandboxConfig, values["sandbox"], "sandbox"),
      settings.section(toolbox.ToolboxConfig, values["tools"], "tools"),
      self.seed,
    )
    self._maker = None  # of an agent of the user's own
    if place := config.place:
      self._maker = registry.find("agent.place", place)
    # What an evaluation's agent is made from.
    self.evaluated = self.lineup
    if strategy := values["eval"].get("context"):
      self.evaluated = self.lineup.with_strategy(strategy)
    self._process = settings.section(
      process.ProcessConfig, values["process"], "process"
    )
    curated = settings.section(
      curation.CurationConfig, values["curation"], "curation"
    )
    groups = values["trainer"]["groups_per_step"]
    groups -= curated.replayed(groups)
    self.rollout, self.window = settings.shared_section(
      values["rollout"],
      "rollout",
      (host.RolloutConfig, {"seed": self.seed}),
      (
        window.WindowConfig,
        {"groups_per_step": groups, "total": values["steps"] * groups},
      ),
    )
    self.domains: dict[str, tasks_base.Domain] = {}
    weights: dict[str, float] = {}
    courses = {}
    for name, section in values["domains"].items():
      section = dict(section)
      weights[name] = section.pop("weight", 1.0)
      if "curriculum" in section:
        courses[name] = settings.section(
          curriculum.CourseConfig,
          section.pop("curriculum"),
          f"domains.{name}.curriculum",
        )
      self.domains[name] = registry.build(
        name, section, self.lineup.sandbox, seed=self.seed
      )

    shared = bool(values["pool"]["database"])
    if shared and any(course.raise_at for course in courses.values()):
      raise errors.ConfigError(
        "a curriculum with raise_at needs one process that draws all tasks: "
        "config.pool.database must be ''"
      )
    # The training tasks.
    self.mixture = mixture.TaskMixture(
      self.domains, weights, "train", self.seed, courses, groups
    )

  def process_rewards(
    self, decode: Callable[[Sequence[int]], str]
  ) -> process.ProcessRewards:
    """What finds faults in completions, given the tokenizer's decoding."""
    return process.ProcessRewards(self._process, decode)

  def make_agent(
    self,
    closing: contextlib.AsyncExitStack,
    line: lineup.Lineup | None = None,
  ) -> agents_base.Agent:
    """The agent; used from one asyncio loop.

    With a `place` in the configuration, the function there makes it, given
    this side and `closing`.

    Args:
      closing: gets what closes the agent.
      line: what it is made from; None: what the run's is made from.

    Raises:
      SandboxError: tools need sandboxes, and this machine cannot make any.
    """
    if self._maker is not None:
      return self._maker(self, closing)
    on_files = any(map(_works_on_files, self.domains.values()))
    return (line or self.lineup).make(closing, on_files=on_files)


def _works_on_files(domain: tasks_base.Domain) -> bool:
  environment = domain.environment(domain.task("train", 0))
  return isinstance(environment, tasks_base.Workspace)
