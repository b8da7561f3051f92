"""RL of a small decoder in one process, at an exact lag, in seconds.

Tasks come from the product's mixture, and credit, packing and update are the
trainer's; only agent, gateway and engine are left out, because an episode is one
reply, which the decoder samples itself.

A pupil begins as what imitates right replies for some steps, so that RL has
successes to reinforce.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import runs
from experiments.toys import decoder as toy_decoder
from experiments.toys import substitution
from forge_jax import types
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.tasks import curriculum, mixture
from forge_jax.trainer import credit, trainer, update
from forge_jax.tree import pack

GROUPS, MEMBERS = 16, 8  # of a step; episodes of a group
HELDOUT = 512  # tasks of an evaluation, of each domain
MODEL = toy_decoder.config(substitution.VOCAB)
PACK = pack.PackConfig(tokens=768, edges=768, rows=768, buckets=1)
_IMITATION = update.UpdateConfig(
  learning_rate=3e-3, ratio_min=1.0, ratio_max=1.0
)


class School:
  """Pupils, and trainers that are compiled once for all of them."""

  def __init__(self, domains: Sequence[substitution.Substitution]):
    """Pupils are taught these domains."""
    self._domains = {domain.name: domain for domain in domains}
    decoder = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0))
    self._graph = nnx.split(decoder)[0]
    self._trainer = functools.cache(self._make_trainer)

  def pupil(self, seed: int, steps: int) -> nnx.State:
    """Weights that have imitated right replies, one a task, for some steps."""
    decoder = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=seed))
    teacher = self._begin(nnx.state(decoder), _IMITATION, "none")
    size = GROUPS * MEMBERS
    tasks_of = self._mixture({}, seed, size)
    for step in range(steps):
      tasks = [tasks_of.task(step * size + n) for n in range(size)]
      replies = np.stack([self._domains[t.domain].truth(t) for t in tasks])
      # Nobody sampled them: they are of no version.
      groups = self._groups(tasks, replies, np.zeros(replies.shape), -1, 1)
      teacher.take_step(teacher.prepare(groups))
    return _copy(teacher.weights().params)

  def learn(
    self,
    params: nnx.State,
    config: update.UpdateConfig,
    *,
    seed: int,
    steps: int,
    lag: int = 0,
    courses: Mapping[str, curriculum.CourseConfig] | None = None,
    every: int = 5,
  ) -> runs.Curve:
    """RL on replies that the weights of `lag` steps ago sampled.

    Args:
      params: to begin with; left as they are.
      config: of the update.
      seed: of tasks and sampling.
      steps: trainer steps.
      lag: exactly, but for the first steps, which have less past.
      courses: of domains whose share changes; else all weigh the same.
      every: steps between evaluations, the first at step 0.

    Returns:
      Metrics by step; with "eval/DOMAIN", see `evaluate`, where there was one.
    """
    learner = self._begin(params, config, "mean")
    tasks_of = self._mixture(courses or {}, seed + 1000, GROUPS)
    key = jax.random.key(seed)
    past = [_copy(params)]  # from oldest to newest
    curve = [(0, self.evaluate(params))]
    for step in range(1, steps + 1):
      first = (step - 1) * GROUPS
      tasks = [
        tasks_of.task(first + n) for n in range(GROUPS) for _ in range(MEMBERS)
      ]
      sampled = self._sample(past[0], tasks, jax.random.fold_in(key, step))
      groups = self._groups(tasks, *sampled, step - len(past), MEMBERS)
      figures = learner.take_step(learner.prepare(groups))
      values = {name: float(x) for name, x in figures.items()}
      past = [*past, _copy(learner.weights().params)][-1 - lag :]
      if step % every == 0:
        values |= self.evaluate(past[-1])
      curve.append((step, values))
    return curve

  def evaluate(self, params: nnx.State) -> dict[str, float]:
    """The share of held-out tasks that are solved, "eval/DOMAIN".

    One reply each, at temperature 1: of pupils that are unsure of every letter,
    greedy replies tell little.
    """
    found = {}
    for name, domain in self._domains.items():
      tasks = [domain.task("heldout", n) for n in range(HELDOUT)]
      replies, _ = self._sample(params, tasks, jax.random.key(0))
      right = [
        bool(domain.rewards(task, reply))
        for task, reply in zip(tasks, replies, strict=True)
      ]
      found[f"eval/{name}"] = float(np.mean(right))
    return found

  def _mixture(
    self,
    courses: Mapping[str, curriculum.CourseConfig],
    seed: int,
    tasks_per_step: int,
  ) -> mixture.TaskMixture:
    even = dict.fromkeys(self._domains, 1.0)
    return mixture.TaskMixture(
      self._domains, even, "train", seed, courses, tasks_per_step
    )

  def _begin(
    self, params: nnx.State, config: update.UpdateConfig, baseline: str
  ) -> trainer.Trainer:
    """A trainer at step 0 with these weights and a fresh optimizer."""
    learner, fresh = self._trainer(config, baseline)
    learner.restore(0, update.TrainState(_copy(params), _copy(fresh)))
    return learner

  def _make_trainer(
    self, config: update.UpdateConfig, baseline: str
  ) -> tuple[trainer.Trainer, Any]:
    """A trainer, and the state of its optimizer at the beginning."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    decoder = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0))
    learner = trainer.Trainer(
      update.Updater(decoder, config, mesh),
      trainer.TrainerConfig(groups_per_step=GROUPS, minibatches=1),
      credit.CreditConfig(baseline=baseline),
      PACK,
      vocab_size=MODEL.vocab_size,
    )
    return learner, _copy(learner.state.opt_state)

  def _sample(
    self,
    params: nnx.State,
    tasks: Sequence[types.Task],
    key: jax.Array,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Replies [B, LETTERS] and their log-probabilities."""
    prompts = [self._domains[task.domain].prompt(task) for task in tasks]
    tokens, logprobs = _reply(self._graph, params, np.stack(prompts), key)
    return np.asarray(tokens), np.asarray(logprobs)

  def _groups(
    self,
    tasks: Sequence[types.Task],
    replies: np.ndarray,
    logprobs: np.ndarray,
    version: int,
    members: int,
  ) -> list[types.Group]:
    """Groups of so many episodes, of replies [B, LETTERS] in their order."""
    episodes = [
      self._episode(n, n % members, task, reply, logprob, version)
      for n, (task, reply, logprob) in enumerate(
        zip(tasks, replies, logprobs, strict=True)
      )
    ]
    return [
      types.Group(n, group[0].task, group)
      for n, group in enumerate(
        tuple(episodes[first : first + members])
        for first in range(0, len(episodes), members)
      )
    ]

  def _episode(
    self,
    number: int,
    member: int,
    task: types.Task,
    reply: np.ndarray,
    logprobs: np.ndarray,
    version: int,
  ) -> types.Episode:
    domain = self._domains[task.domain]
    completion = types.Completion(
      id="0",
      prompt_ids=domain.prompt(task),
      response_ids=reply,
      logprobs=logprobs.astype(np.float32),
      versions=np.full(len(reply), version, np.int32),
      stop_reason=types.StopReason.LENGTH,
    )
    return types.Episode(
      id=f"{number}",
      task=task,
      member=member,
      seed=0,
      status=types.EpisodeStatus.COMPLETED,
      completions=(completion,),
      rewards=tuple(domain.rewards(task, reply)),
    )


@functools.partial(jax.jit, static_argnums=0)
def _reply(graph, params, prompt_BP, key):
  """Tokens and log-probabilities [B, LETTERS]."""
  decoder = nnx.merge(graph, params)
  size = prompt_BP.shape[1]
  tokens_BT = jnp.pad(prompt_BP, ((0, 0), (0, substitution.LETTERS)))
  logprobs = []
  for t in range(size, size + substitution.LETTERS):
    log_BV = toy_decoder.logprobs(decoder, tokens_BT[:, :t])[:, -1]
    token_B = jax.random.categorical(jax.random.fold_in(key, t), log_BV)
    tokens_BT = tokens_BT.at[:, t].set(token_B)
    logprobs.append(jnp.take_along_axis(log_BV, token_B[:, None], 1)[:, 0])
  return tokens_BT[:, size:], jnp.stack(logprobs, axis=1)


def _copy[T](state: T) -> T:
  """The same arrays, in buffers that a later update does not take."""
  return jax.tree.map(jnp.copy, state)
