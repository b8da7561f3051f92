"""Tasksets of `verifiers` (Prime Intellect), as they are, as a domain.

The environment of verifiers plays and scores the episode itself, next to its
agent, by `agents/verifiers_episode.py`; here its verdict becomes named rewards.
What is scored where it is played can be tampered with by what plays: a harness
that runs commands can write the verdict. Nothing is installed for it here.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from forge_jax import errors, types

EPISODE, VERDICT = "episode.json", "verdict.json"


@dataclasses.dataclass(frozen=True, slots=True)
class VerifiersConfig:
  """Which environment, and which of its tasks."""

  # As in verifiers' [env] block, such as {"taskset": {"id": "gsm8k-v1"},
  # "agent": {"harness": {"id": "null"}}}.
  env: Mapping[str, Any]
  train: int  # tasks 0 .. train-1 of the taskset
  heldout: int  # tasks train .. train+heldout-1
  max_tokens: int = 1024  # most new tokens of one completion

  def __post_init__(self):
    if not self.env.get("taskset", {}).get("id"):
      raise errors.ConfigError(
        f"verifiers env is {dict(self.env)!r}; expected a taskset with an id"
      )
    if self.train < 1 or self.heldout < 0:
      raise errors.ConfigError(
        f"verifiers train is {self.train} and heldout {self.heldout}; expected "
        "at least 1 and 0"
      )


class VerifiersDomain:
  """Goes round a split's tasks for ever, in the taskset's order."""

  def __init__(self, config: VerifiersConfig):
    """Takes what is asked from a configuration."""
    self._config = config
    self.name = config.env["taskset"]["id"]
    self.max_tokens = config.max_tokens

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task of "train" or "heldout".

    Raises:
      ConfigError: there is no such split, or nothing in it.
    """
    sizes = {"train": self._config.train, "heldout": self._config.heldout}
    if not sizes.get(split):
      raise errors.ConfigError(
        f"{self.name} has no tasks in split {split!r}; expected one of "
        f"{[name for name, size in sizes.items() if size]}"
      )
    first = 0 if split == "train" else self._config.train
    return types.Task(
      id=f"{self.name}/{split}/{index}",
      domain=self.name,
      index=index,
      payload={"index": first + index % sizes[split]},
    )

  def environment(self, task: types.Task) -> "VerifiersEnvironment":
    """A fresh environment for one episode of the task."""
    return VerifiersEnvironment(self._config.env, task)


class VerifiersEnvironment:
  """Hands an episode out to be played, and takes its verdict."""

  tools: Sequence[types.Message] = ()

  def __init__(self, env: Mapping[str, Any], task: types.Task):
    self._env = env
    self._task = task
    self._verdict: bytes | None = None

  def reset(self) -> types.Messages:
    """What is played, for people: the prompt is the taskset's to give."""
    return [{"role": "user", "content": self._task.id}]

  def respond(self, reply: types.Message) -> None:
    """There is nothing to say: the work is in files."""

  def files(self) -> Mapping[str, bytes]:
    """What shall be played."""
    spec = {"config": self._env, "index": self._task.payload["index"]}
    return {EPISODE: json.dumps(spec).encode()}

  def collect(self, files: Mapping[str, bytes]) -> None:
    """Takes the verdict, if there is one."""
    self._verdict = files.get(VERDICT)

  def rewards(self) -> Sequence[types.Reward]:
    """The environment's weighted rewards, by name; none: nothing was scored.

    Raises:
      ForgeError: the environment says that its episode failed.
      ValueError: the verdict is none.
    """
    if self._verdict is None:
      return []
    verdict = json.loads(self._verdict)
    if not verdict["ok"]:
      raise errors.AgentError(f"verifiers: {'; '.join(verdict['errors'])}")
    return [
      types.Reward(name, types.Component.PERF, value)
      for name, value in verdict["rewards"].items()
    ]
