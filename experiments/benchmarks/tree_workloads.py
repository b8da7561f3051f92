"""What agents' episodes look like to the trainer: the tree benchmark's inputs.

A workload is one group: rollouts of a prompt, each a sequence of turns. Every
turn is a request of its own, whose prompt is the history so far and whose
response bears the loss:

  append      the history is all that was said
  strip       thinking is sampled but removed from later prompts
  tau         a long policy as prompt, tool calls and their results
  swe         many turns over a code base
  grpo        one long answer to one long prompt
  compaction  every few turns the model sums up, and the history becomes the
              prompt and that summary
  none        unrelated requests: nothing to share
  deep        many short turns, so that nearly all of a request is history
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from forge_jax import types

Episode = list[types.Sample]  # one rollout's requests, in order


@dataclasses.dataclass(frozen=True)
class Workload:
  """Mean sizes in tokens; all but the prompt vary by a quarter (std)."""

  prompt: int
  rollouts: int
  turns: int
  action: int  # what is sampled in a turn
  observation: int = 0  # what the environment answers
  thinking: int = 0  # sampled before the action, then removed from the history
  summary: int = 0  # sampled every `rewrite` turns, then replaces the history
  rewrite: int = 0
  shared: bool = (
    True  # False: a prompt per rollout, of 0.1 to 1.9 times `prompt`
  )


WORKLOADS: Mapping[str, Workload] = {
  "append": Workload(1024, 8, 10, action=64, observation=64),
  "strip": Workload(1024, 8, 10, action=64, observation=64, thinking=96),
  "tau": Workload(6144, 16, 15, action=32, observation=48),
  "swe": Workload(4096, 8, 40, action=32, observation=64),
  "grpo": Workload(8192, 16, 1, action=1024),
  "compaction": Workload(
    1024, 8, 16, action=64, observation=64, summary=128, rewrite=8
  ),
  "none": Workload(1500, 16, 1, action=100, shared=False),
  "deep": Workload(2048, 8, 60, action=16, observation=32),
}


def reduced(workload: Workload) -> Workload:
  """The same kind of history at a size for tests: requests < 64 tokens."""
  return dataclasses.replace(
    workload,
    prompt=min(4 + workload.prompt // 512, 16),
    rollouts=3,
    turns=min(workload.turns, 5),
    action=min(1 + workload.action // 16, 12),
    observation=workload.observation // 16,
    thinking=workload.thinking // 16,
    summary=workload.summary // 32,
    rewrite=min(workload.rewrite, 2),
  )


def episodes(
  workload: Workload, rng: np.random.Generator, vocab_size: int
) -> list[Episode]:
  """The group's rollouts, random tokens and figures.

  Log-probabilities are near those of a fresh model, so that importance ratios
  are near 1; a rollout has one advantage.
  """

  def ids(mean: int) -> np.ndarray:
    size = max(round(rng.normal(mean, mean / 4)), 1) if mean else 0
    return rng.integers(0, vocab_size, size).astype(np.int32)

  def prompt() -> np.ndarray:
    size = workload.prompt
    if not workload.shared:
      size = max(round(size * rng.uniform(0.1, 1.9)), 1)
    return rng.integers(0, vocab_size, size).astype(np.int32)

  first, result = prompt(), []
  for rollout in range(workload.rollouts):
    root = first if workload.shared else prompt()
    advantage = rng.normal()
    episode: Episode = []

    def request(
      history, response, episode=episode, rollout=rollout, advantage=advantage
    ):
      size = len(response)
      episode.append(
        types.Sample(
          name=f"{rollout}/{len(episode)}",
          prompt_ids=history,
          response_ids=response,
          logprobs=rng.normal(-np.log(vocab_size), 0.1, size).astype(
            np.float32
          ),
          advantages=np.full(size, advantage, np.float32),
          weights=np.full(size, 2.0**-10, np.float32),
          versions=np.zeros(size, np.int32),
        )
      )

    history = root
    for turn in range(workload.turns):
      thinking, action = ids(workload.thinking), ids(workload.action)
      request(history, np.concatenate([thinking, action]))
      seen = ids(workload.observation)
      history = np.concatenate([history, action, seen])
      if workload.rewrite and (turn + 1) % workload.rewrite == 0:
        summary = ids(workload.summary)
        request(history, summary)
        history = np.concatenate([root, summary])
    result.append(episode)
  return result


def requests(group: Sequence[Episode]) -> list[types.Sample]:
  """Every request as a sample of its own."""
  return [sample for episode in group for sample in episode]


def trajectories(group: Sequence[Episode]) -> list[types.Sample]:
  """What systems without a prefix tree train on: one sample per history.

  Requests that extend one another are one sample with a loss on each of their
  responses; where the history was rewritten, a new sample begins. The loss is
  that of the requests one by one.
  """
  samples = []
  for episode in group:
    chains: list[Episode] = []
    for request in episode:
      if chains and _extends(chains[-1][-1], request):
        chains[-1].append(request)
      else:
        chains.append([request])
    samples.extend(_join(chain) for chain in chains)
  return samples


def _extends(before: types.Sample, after: types.Sample) -> bool:
  """Whether a request's prompt begins with all of an earlier one."""
  whole = np.concatenate([before.prompt_ids, before.response_ids])
  return np.array_equal(after.prompt_ids[: len(whole)], whole)


def _join(chain: Sequence[types.Sample]) -> types.Sample:
  """One sample of requests that extend one another."""
  first, last = chain[0], chain[-1]
  start = len(first.prompt_ids)
  whole = np.concatenate([last.prompt_ids, last.response_ids])

  def spread(name: str) -> np.ndarray:
    out = np.zeros(len(whole) - start, getattr(first, name).dtype)
    for part in chain:
      at = len(part.prompt_ids) - start
      out[at : at + len(part.response_ids)] = getattr(part, name)
    return out

  return types.Sample(
    name=first.name,
    prompt_ids=first.prompt_ids,
    response_ids=whole[start:],
    **{
      name: spread(name)
      for name in ("logprobs", "advantages", "weights", "versions")
    },
  )
