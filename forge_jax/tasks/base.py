"""What a domain and its environments are.

A `Domain` is an endless, seeded sequence of tasks per split; an `Environment`
is one episode's world: it opens the conversation, answers the policy's
messages and scores what happened. Environments know nothing of tokens.
"""

from collections.abc import Awaitable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from forge_jax import types

TEXT: Mapping[str, Any] = {"type": "string"}  # schema of an argument


def tool(
  name: str,
  description: str,
  arguments: Mapping[str, Mapping[str, Any]],
  optional: Collection[str] = (),
) -> types.Message:
  """A tool's specification in the OpenAI wire format.

  Args:
    name: that calls have.
    description: what the model is told of it.
    arguments: by name, each a JSON schema.
    optional: those of them that a call may lack.
  """
  parameters = {
    "type": "object",
    "properties": {key: dict(schema) for key, schema in arguments.items()},
    "required": [key for key in arguments if key not in optional],
  }
  return {
    "type": "function",
    "function": {
      "name": name,
      "description": description,
      "parameters": parameters,
    },
  }


class Environment(Protocol):
  """The world of one episode."""

  @property
  def tools(self) -> Sequence[types.Message]:
    """Tool specifications in the OpenAI wire format; empty: none."""

  def reset(self) -> types.Messages:
    """The messages that open the conversation."""

  def respond(
    self, reply: types.Message
  ) -> types.Messages | Awaitable[types.Messages | None] | None:
    """Answers an assistant message; None ends the episode.

    What takes its time (a slow tool) is a coroutine.
    """

  def rewards(
    self,
  ) -> Sequence[types.Reward] | Awaitable[Sequence[types.Reward]]:
    """The named rewards of what has happened so far.

    A plain method runs on a thread of its own, so that it may take its time;
    what runs programs (a sandbox) is a coroutine. What it raises, or that it
    does not end in time, is noted on the episode.
    """


@runtime_checkable
class Workspace(Protocol):
  """What an environment has besides, if its work is done on files."""

  def files(self) -> Mapping[str, bytes]:
    """What an agent finds, by path relative to its work directory."""

  def collect(self, files: Mapping[str, bytes]) -> None:
    """Takes what the agent left, however it ended; then `rewards` is asked."""


@runtime_checkable
class Equipped(Protocol):
  """What a workspace has besides, if it is a matter of certain tools."""

  @property
  def toolset(self) -> Sequence[str]:
    """Their names in agents/toolbox.py; a white-box agent gets these."""


class Domain(Protocol):
  """A kind of task, with its splits and its verifier."""

  @property
  def name(self) -> str:
    """The domain's name, the first part of its tasks' ids."""

  @property
  def max_tokens(self) -> int:
    """Most new tokens of one completion."""

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task of a split; the same for the same domain seed."""

  def environment(self, task: types.Task) -> Environment:
    """A fresh environment for one episode of the task."""


@runtime_checkable
class Graded(Protocol):
  """What a domain has besides, if its tasks can be harder or easier."""

  def at(self, level: int) -> Domain:
    """The same domain with tasks of another difficulty, 0 being the easiest.

    Raises:
      ConfigError: it has no such level.
    """


@runtime_checkable
class Scripted(Protocol):
  """What a domain has besides, if programs can play it: for baselines."""

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What a policy without a model replies, turn by turn.

    Every domain knows "random", which knows nothing of the task, and "optimal",
    which knows its solution.
    """
