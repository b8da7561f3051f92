"""Credit: from the groups of a step to weighted samples.

1. A step is a completion. A reward lands on the completion that it names, or
   on the episode's last one; the speed reward lands on the last one.
2. r_t = alpha * process + beta * speed + perf, each capped per episode, with
   factors and caps of the task's domain. G_t = r_t + gamma_t G_(t+1) is the
   reward-to-go, with gamma_t = gamma from a step of the main agent on, and 1
   from one of a sub-agent: what sub-agents do lies within one step of the agent
   that asked for it.
3. A_t = s_t (G_t - B_t) with B_t the baseline, by default the group's mean
   return from its t-th steps on, for every response token of completion t;
   s_t = sub_agent_share for a sub-agent's completion, else 1.
4. Each token weighs one over the response tokens of all the groups given: into
   how many requests an episode's tokens are split changes nothing.

Completions whose advantage is exactly 0 add nothing to the gradient: they are
counted in the normaliser, then dropped.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from forge_jax import errors, types
from forge_jax.algo import advantages, rewards


@dataclasses.dataclass(frozen=True)
class CreditConfig:
  """How rewards become advantages."""

  gamma: float = 1.0  # discount per completion
  alpha: float = 1.0  # factor of process rewards
  beta: float = 0.0  # factor of the speed reward
  baseline: str = "mean"  # see algo.advantages.group_baseline
  divide_by_std: bool = False  # divide advantages by the group's std
  process_cap: float = 1.0  # largest |sum| of process rewards of an episode
  speed_cap: float = 1.0  # largest speed reward of an episode
  perf_cap: float = 1.0  # largest |sum| of perf rewards of an episode
  # Of the episode's credit, what a sub-agent's completions get. 1: they share
  # it in full; 0: none, they are trained as little as a tool is.
  sub_agent_share: float = 1.0
  # Other values of the above for the groups of a domain, such as
  # {"bug_fixing": {"beta": 0.2}}.
  domains: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    for domain in self.domains:
      self.of(domain)
    if self.baseline not in advantages.BASELINES:
      raise errors.ConfigError(
        f"credit.baseline={self.baseline!r}; expected one of "
        f"{', '.join(advantages.BASELINES)}"
      )
    if not 0 <= self.gamma <= 1:
      raise errors.ConfigError(f"credit.gamma={self.gamma} is not in [0, 1]")
    if not 0 <= self.sub_agent_share <= 1:
      raise errors.ConfigError(
        f"credit.sub_agent_share={self.sub_agent_share} is not in [0, 1]"
      )
    for name in ("process_cap", "speed_cap", "perf_cap"):
      if getattr(self, name) < 0:
        raise errors.ConfigError(
          f"credit.{name}={getattr(self, name)} is negative"
        )

  def of(self, domain: str) -> "CreditConfig":
    """What holds for a domain's groups.

    Raises:
      ConfigError: what is given for it cannot work.
    """
    if domain not in self.domains:
      return self
    known = {f.name for f in dataclasses.fields(self)} - {"domains"}
    unknown = sorted(set(self.domains[domain]) - known)
    if unknown:
      raise errors.ConfigError(
        f"credit.domains.{domain} has {', '.join(unknown)}; expected of "
        f"{', '.join(sorted(known))}"
      )
    return dataclasses.replace(self, domains={}, **self.domains[domain])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Score:
  """What an episode got."""

  domain: str
  failed: bool  # its agent or its environment raised
  success: bool  # perf >= 1, before its cap
  process: float  # sum over its steps, capped, alpha left out
  speed: float  # capped, beta left out
  perf: float  # sum over its steps, capped
  named: Mapping[str, float]  # sum of the rewards of each name, uncapped
  noted: Mapping[str, int]  # how many rewards of each name
  completions: int
  response_tokens: int
  seconds: float  # wall-clock
  total_S: np.ndarray  # float64 [S], the rewards that it is trained on


@dataclasses.dataclass(frozen=True)
class CreditStats:
  """What credit assignment saw."""

  episodes: int
  samples: int  # kept
  dropped_samples: int  # with an advantage of 0 on every token
  response_tokens: int  # of all completions, dropped ones included
  mean_reward: float  # undiscounted, per episode, components combined
  success_rate: float  # share of episodes with perf >= 1
  advantage_std: float  # over all response tokens
  scores: tuple["Score", ...]  # of the episodes


def assign_credit(
  groups: Sequence[types.Group], config: CreditConfig
) -> tuple[list[types.Sample], CreditStats]:
  """Samples of all completions with a non-zero advantage.

  Episodes without completions count in the baseline and in the statistics.

  Args:
    groups: groups of at least one episode.
    config: how.

  Returns:
    The samples, in the order of groups, episodes and completions, and
    statistics.

  Raises:
    SampleError: a reward of an unknown completion, or one not finite.
    ConfigError: a leave-one-out baseline of a group of one episode.
  """
  episodes = [episode for group in groups for episode in group.episodes]
  scores, advantages_of = [], []
  for group in groups:
    own = config.of(group.task.domain)
    group_scores = _scores(group, own)
    scores += group_scores
    advantages_of += _group_advantages(group, group_scores, own)
  total = sum(len(c.response_ids) for e in episodes for c in e.completions)
  samples = []
  for episode, advantage_S in zip(episodes, advantages_of, strict=True):
    # An episode without completions still has one step to hold its rewards.
    for number, completion in enumerate(episode.completions):
      advantage = np.float32(advantage_S[number])
      if len(completion.response_ids) and advantage:
        samples.append(
          _sample(episode.id, number, completion, advantage, total)
        )
  return samples, _stats(episodes, scores, advantages_of, samples)


def _stats(
  episodes: Sequence[types.Episode],
  scores: Sequence["Score"],
  advantages_of: Sequence[np.ndarray],
  samples: Sequence[types.Sample],
) -> CreditStats:
  sizes = [len(c.response_ids) for e in episodes for c in e.completions]
  advantage = [
    advantage_S[: len(episode.completions)]
    for episode, advantage_S in zip(episodes, advantages_of, strict=True)
  ]
  per_token = np.repeat(np.concatenate([*advantage, np.empty(0)]), sizes)
  count = max(len(episodes), 1)
  return CreditStats(
    episodes=len(episodes),
    samples=len(samples),
    dropped_samples=len(sizes) - len(samples),
    response_tokens=sum(sizes),
    mean_reward=sum(float(score.total_S.sum()) for score in scores) / count,
    success_rate=sum(e.perf >= 1 for e in episodes) / count,
    advantage_std=float(per_token.std()) if len(per_token) else 0.0,
    scores=tuple(scores),
  )


def _sample(
  episode: str,
  number: int,
  completion: types.Completion,
  advantage: float,
  total: int,
) -> types.Sample:
  size = len(completion.response_ids)
  return types.Sample(
    name=f"{episode}/{number}",
    prompt_ids=completion.prompt_ids,
    response_ids=completion.response_ids,
    logprobs=completion.logprobs,
    advantages=np.full(size, advantage, np.float32),
    weights=np.full(size, 1 / total, np.float32),
    # Of a completion that saw a swap of weights, part of the cache is older
    # than the tokens say; one that is not plain was sampled from another
    # distribution than the policy's: neither is evidence of a mismatch.
    versions=np.where(
      completion.plain and np.ptp(completion.versions) == 0,
      completion.versions,
      -1,
    ),
    episode=episode,
  )


def _scores(group: types.Group, config: CreditConfig) -> list[Score]:
  """What each episode got, S being at least 1."""
  speed_G = rewards.speed(
    np.array([episode.seconds for episode in group.episodes]),
    np.array([episode.perf >= 1 for episode in group.episodes]),
  )
  result = []
  for episode, speed in zip(group.episodes, speed_G, strict=True):
    process_S = rewards.cap_total(
      _component(episode, types.Component.PROCESS), config.process_cap
    )
    perf_S = rewards.cap_total(
      _component(episode, types.Component.PERF), config.perf_cap
    )
    speed_S = np.zeros(len(perf_S))
    speed_S[-1] = min(speed, config.speed_cap)
    total_S = rewards.combine(
      process_S, speed_S, perf_S, alpha=config.alpha, beta=config.beta
    )
    result.append(_score(episode, process_S, speed_S, perf_S, total_S))
  return result


def _score(
  episode: types.Episode,
  process_S: np.ndarray,
  speed_S: np.ndarray,
  perf_S: np.ndarray,
  total_S: np.ndarray,
) -> Score:
  named: dict[str, float] = collections.defaultdict(float)
  for reward in episode.rewards:
    named[reward.name] += reward.value
  return Score(
    domain=episode.task.domain,
    failed=episode.status == types.EpisodeStatus.FAILED,
    success=episode.perf >= 1,
    process=float(process_S.sum()),
    speed=float(speed_S.sum()),
    perf=float(perf_S.sum()),
    named=dict(named),
    noted=collections.Counter(reward.name for reward in episode.rewards),
    completions=len(episode.completions),
    response_tokens=sum(len(c.response_ids) for c in episode.completions),
    seconds=episode.seconds,
    total_S=total_S,
  )


def _component(
  episode: types.Episode, component: types.Component
) -> np.ndarray:
  """The sum of a component's rewards at each step."""
  steps = len(episode.completions)
  values_S = np.zeros(max(steps, 1))
  for reward in episode.rewards:
    if reward.component != component:
      continue
    if not np.isfinite(reward.value):
      raise errors.SampleError(
        f"episode {episode.id}: reward {reward.name} is {reward.value}"
      )
    if reward.step is not None and not 0 <= reward.step < steps:
      raise errors.SampleError(
        f"episode {episode.id}: reward {reward.name} names completion "
        f"{reward.step}, but there are {steps}"
      )
    values_S[-1 if reward.step is None else reward.step] += reward.value
  return values_S


def _group_advantages(
  group: types.Group, scores: Sequence[Score], config: CreditConfig
) -> list[np.ndarray]:
  """Each episode's advantages [S]."""
  by_sub_agent = [_by_sub_agent(episode) for episode in group.episodes]
  returns = [
    advantages.reward_to_go(score.total_S, np.where(sub_S, 1.0, config.gamma))
    for score, sub_S in zip(scores, by_sub_agent, strict=True)
  ]
  start_G = np.array([returns_S[0] for returns_S in returns])
  baselines = advantages.group_baseline(returns, config.baseline)
  scale = advantages.group_scale(start_G) if config.divide_by_std else 1.0
  return [
    (returns_S - baseline_S)
    / scale
    * np.where(sub_S, config.sub_agent_share, 1.0)
    for returns_S, baseline_S, sub_S in zip(
      returns, baselines, by_sub_agent, strict=True
    )
  ]


def _by_sub_agent(episode: types.Episode) -> np.ndarray:
  """Whether each step is a sub-agent's; bool [S], S being at least 1."""
  kinds = [c.request and c.request.kind for c in episode.completions]
  sub_agent = types.RequestKind.SUB_AGENT
  return np.array([kind == sub_agent for kind in kinds] or [False])
