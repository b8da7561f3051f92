"""What rolls out tasks, from a run's configuration; nothing imports JAX."""

from collections.abc import Mapping
from typing import Any

from forge_jax import errors, settings
from forge_jax.agents import context, react
from forge_jax.pool import curation, window
from forge_jax.rollout import host
from forge_jax.tasks import base as tasks_base
from forge_jax.tasks import mixture, word_problems

DOMAINS = {
  "word_problems": (
    word_problems.WordProblems,
    word_problems.WordProblemsConfig,
  ),
}


class RolloutSide:
  """Tasks, agent and host of a run; the same in each of its processes."""

  def __init__(self, values: Mapping[str, Any]):
    """Reads a resolved configuration.

    Raises:
      ConfigError: an unknown key, or a value that cannot work.
    """
    self.seed = values["seed"]
    self.agent = settings.section(react.ReactConfig, values["agent"], "agent")
    self.context = settings.section(
      context.ContextConfig, values["context"], "context"
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
    self._weights: dict[str, float] = {}
    for name, section in values["domains"].items():
      self._add_domain(name, dict(section))

  def mixture(self) -> mixture.TaskMixture:
    """The training tasks."""
    return mixture.TaskMixture(self.domains, self._weights, "train", self.seed)

  def make_agent(self) -> react.ReactAgent:
    """The agent; used from one asyncio loop."""
    return react.ReactAgent(self.agent, context=self.context)

  def _add_domain(self, name: str, section: dict[str, Any]) -> None:
    if name not in DOMAINS:
      raise errors.ConfigError(
        f"config.domains.{name} is unknown; known: {sorted(DOMAINS)}"
      )
    domain, config = DOMAINS[name]
    self._weights[name] = section.pop("weight", 1.0)
    self.domains[name] = domain(
      settings.section(config, section, f"domains.{name}", seed=self.seed)
    )
