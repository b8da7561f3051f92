"""An engine that says what the domains' scripts say: imitation.

Rollouts, gateway, pool and trainer are those of any run, so that what is
imitated are the requests that an agent really makes.
"""

import collections
from collections.abc import Mapping, Sequence
import random
import re
import time
from typing import Any

from forge_jax import errors, types
from forge_jax.engine import api, scripted
from forge_jax.gateway import template
from forge_jax.tasks import base as tasks_base
from forge_jax.tasks import mixture as mixture_lib

# The names of sessions that hosts and evaluations open; see rollout/.
_TRAINED = re.compile(r"group(\d+)-\d+-\w+")
_EVALUATED = re.compile(r"eval-([^/]+)/([^/]+)/(\d+)-\w+")


class TeacherEngine(scripted.ScriptedEngine):
  """Replies to an episode's n-th request with the n-th message of a script."""

  def __init__(
    self,
    domains: Mapping[str, tasks_base.Domain],
    mixture: mixture_lib.TaskMixture,
    policies: Sequence[str],
    tokenizer: Any,
    max_context: int,
  ):
    """Plays the policies, one an episode, each as likely.

    Args:
      domains: that are played, by name.
      mixture: of the training tasks.
      policies: that every domain has a script for.
      tokenizer: of the model that is to imitate them, with its chat template.
      max_context: most tokens of prompt and response.

    Raises:
      ConfigError: a domain has no scripts, or none for a policy.
    """
    for name, domain in domains.items():
      if not isinstance(domain, tasks_base.Scripted):
        raise errors.ConfigError(f"the domain {name} has no scripts to imitate")
      for policy in policies:  # one that is unknown is told now
        domain.script(domain.task("train", 0), policy)
    self._domains, self._mixture = domains, mixture
    self._policies = policies
    self._tokenizer = tokenizer
    self._template = template.ChatTemplate(tokenizer, {})
    self._turns: collections.Counter[str] = collections.Counter()
    self._began = time.monotonic()
    super().__init__(
      self._play, max_context=max_context, decode=tokenizer.decode
    )

  def start(self) -> None:
    """There is nothing to start."""

  def stop(self) -> None:
    """There is nothing to stop."""

  def stats(self) -> Mapping[str, float]:
    """As an engine's that samples; it is busy all the time."""
    figures = super().stats()
    return {
      **figures,
      "sampled_tokens": figures["tokens_sampled"],
      "busy_seconds": time.monotonic() - self._began,
    }

  def _play(self, request: api.GenerateRequest) -> Sequence[int]:
    session = request.session
    domain, task = self._find(session)
    policy = random.Random(session).choice(self._policies)
    script = domain.script(task, policy)
    turn = self._turns[session]
    if turn == len(script):
      raise errors.EngineError(f"the script of {session!r} has {turn} replies")
    self._turns[session] += 1
    text = self._written(script[turn])
    ids = self._tokenizer.encode(text, add_special_tokens=False)
    return [*ids, self._tokenizer.eos_token_id]

  def _find(self, session: str) -> tuple[tasks_base.Scripted, types.Task]:
    if found := _TRAINED.fullmatch(session):
      task = self._mixture.task(int(found[1]))
      return self._domains[task.domain], task
    if found := _EVALUATED.fullmatch(session):
      domain = self._domains[found[1]]
      return domain, domain.task(found[2], int(found[3]))
    raise errors.EngineError(f"no task belongs to the session {session!r}")

  def _written(self, reply: types.Message) -> str:
    """A reply as the template writes it, without what opens and closes it."""
    question = [{"role": "user", "content": ""}]
    opened = self._template.text(question, (), True)
    whole = self._template.text([*question, reply], (), False)
    return whole.removeprefix(opened).removesuffix(self._template.closing)
