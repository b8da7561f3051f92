"""Prints what policies without a model reach in a domain.

python -m launch.baselines --domain=terminal --tasks=100
  --domain=my_package.my_task:MyTask    a domain of your own
"""

import asyncio

from absl import app, flags

from forge_jax.agents.sandbox import backends
from forge_jax.rollout import baselines
from launch import cli, registry

_DOMAIN = flags.DEFINE_string(
  "domain", None, f"One of {', '.join(registry.DOMAINS)}, or module:Class."
)
_TASKS = flags.DEFINE_integer("tasks", 100, "Tasks of each split.")
_POLICIES = flags.DEFINE_list("policies", ["random", "optimal"], "Who plays.")
_LEVELS = flags.DEFINE_list("levels", ["0"], "Difficulties.")
_SPLITS = flags.DEFINE_list("splits", ["train", "heldout"], "Which tasks.")


def main(argv):
  del argv
  name = _DOMAIN.value
  values = {"place": name} if ":" in name else {}
  config = backends.SandboxConfig()
  domain = registry.build(name, values, config, seed=0)
  print("split     level  policy       success   reward   seconds")
  for split in _SPLITS.value:
    for level in map(int, _LEVELS.value):
      graded = domain.at(level) if level else domain
      for policy in _POLICIES.value:
        played = baselines.play(
          graded, split, _TASKS.value, policy, backends.make(config)
        )
        found = asyncio.run(played)
        print(
          f"{split:8}  {level:5}  {policy:11}  {found.success_rate:7.1%}  "
          f"{found.mean_reward:7.3f}  {found.seconds:8.2f}"
        )


if __name__ == "__main__":
  flags.mark_flag_as_required("domain")
  app.run(cli.guarded(main), flags_parser=cli.parse_flags)
