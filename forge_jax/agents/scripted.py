"""An agent without a model: it says what it was told, whatever it hears.

For baselines, and for trying an environment out.
"""

from collections.abc import Sequence

from forge_jax import types
from forge_jax.agents import base
from forge_jax.tasks import base as tasks_base


class ScriptedAgent:
  """Plays one episode after a script."""

  def __init__(self, script: Sequence[types.Message]):
    """Takes the assistant messages, in order."""
    self._script = script

  async def run(
    self,
    environment: tasks_base.Environment,
    endpoint: base.Endpoint | None = None,
  ) -> types.Messages:
    """Plays to the end of the episode or of the script."""
    del endpoint  # nobody is asked
    transcript = [dict(message) for message in environment.reset()]
    for reply in self._script:
      transcript.append(dict(reply))
      observations = await base.respond(environment, reply)
      if observations is None:
        break
      transcript += observations
    return transcript
