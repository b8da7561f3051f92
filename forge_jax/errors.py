"""Errors at the boundaries, one small hierarchy.

A rollout's failure is data on its episode; a trainer's failure is a crash with
a message. Every message says what was wrong, where, and what was expected.
Broad `except` clauses exist only at these boundaries: an episode's run
(rollout), an engine step, a gateway request and an absl main.
"""


class ForgeError(Exception):
  """Base of every error a user of forge-jax is meant to read."""


class ConfigError(ForgeError):
  """A configuration that cannot work, found before anything is started."""


class CheckpointError(ForgeError):
  """A model file or a training checkpoint that cannot be read or written."""


class EngineError(ForgeError):
  """A request that the engine refuses or cannot finish."""


class EngineUnavailableError(EngineError):
  """An engine that cannot serve now: stopped, failed or out of reach."""


class EngineBusyError(EngineUnavailableError):
  """An engine whose queue is full: worth another try later."""


class ContextOverflowError(EngineError):
  """A prompt that leaves no room for a response in the context."""


class GrammarError(EngineError):
  """A grammar that no response can be constrained to; says what is wrong."""


class GatewayError(ForgeError):
  """A request that the gateway refuses, or a gateway that cannot be used."""


class PoolError(ForgeError):
  """A data pool that cannot be opened, read or appended to."""


class SampleError(ForgeError):
  """A training sample that is not well-formed; the message names it."""


class MismatchError(ForgeError):
  """Engine and trainer that do not compute the same with the same weights."""


class CollapseError(ForgeError):
  """A run whose policy has broken down; names the last good checkpoint."""


class SandboxError(ForgeError):
  """A sandbox that this machine cannot make, or that cannot be used."""


class AgentError(ForgeError):
  """An agent's program that ended without doing its work."""
