"""Says whether merging saves what it could, and if it does not, why.

1. A request's predecessor is the previous request of its episode. One that
   extends it adds no more than what follows the predecessor's tokens.
2. The possible ratio is the merge ratio if every request did so; the first
   requests of neighbouring episodes share what their prompts do share.
3. Far below it, each request is compared with its predecessor; the kind of
   fork that loses most tokens is named.

Only lengths and first prompts are read as long as merging is healthy.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import enum
import itertools

import numpy as np

from forge_jax import types
from forge_jax.tree import merge

_OPENING = 8  # most tokens that a chat template puts before a response
_SAME = 4  # equal tokens in a row that are no coincidence


class Reason(enum.StrEnum):
  """Where a request differs from its predecessor."""

  PROMPT = "prompt"  # in the prompt that the episode began with
  HISTORY = "history"  # in an earlier turn
  COMPACTED = "compacted"  # in an earlier turn, and the request is shorter
  LEFT_OUT = "left_out"  # the predecessor's response lacks a part
  RESPONSE = "response"  # otherwise within the predecessor's response


@dataclasses.dataclass(frozen=True)
class Cause:
  """The kind of fork that loses most tokens."""

  reason: Reason
  share: float  # of the requests that have a predecessor, 0..1
  depth: int  # tokens within which nine in ten of these forks are
  turn: int  # median of the earlier prompts no longer than what is shared

  def __str__(self) -> str:
    requests = f"{self.share:.0%} of requests"
    match self.reason:
      case Reason.PROMPT:
        return (
          f"{requests} differ from their predecessor within the first "
          f"{self.depth} tokens"
        )
      case Reason.HISTORY:
        return (
          f"{requests} share the prompt but rewrite their history after "
          f"turn {self.turn}"
        )
      case Reason.COMPACTED:
        return (
          f"{requests} replace their history after turn {self.turn} by "
          "something shorter"
        )
      case Reason.LEFT_OUT:
        return (
          f"{requests} leave out a part of their predecessor's response, such "
          "as its reasoning"
        )
      case Reason.RESPONSE:
        return (
          f"{requests} differ inside their predecessor's response: it is "
          "missing, or was encoded again from text"
        )


@dataclasses.dataclass(frozen=True)
class Sharing:
  """How well the requests of a step merge."""

  merge_ratio: float  # request tokens / unique tokens
  possible_ratio: float  # the same if every request extended its predecessor
  cause: Cause | None  # of a collapse; None: merging is healthy

  @property
  def collapsed(self) -> bool:
    """Whether the ratio is far below the possible one."""
    return self.cause is not None

  def __str__(self) -> str:
    ratios = f"merge ratio {self.merge_ratio:.1f} of {self.possible_ratio:.1f} possible"
    return f"{ratios}: {self.cause}" if self.cause else ratios


@dataclasses.dataclass(frozen=True, slots=True)
class _Fork:
  """A request that does not extend its predecessor."""

  reason: Reason
  depth: int  # tokens that the two share
  turn: int
  lost: int  # tokens that the two could share but do not


Chain = Sequence[types.Sample]  # one episode's, in the order of its requests


def examine(
  updates: Sequence[Sequence[types.Sample]],
  merge_ratio: float,
  *,
  limit: float = 0.5,
) -> Sharing:
  """Compares a step's merging with what its requests make possible.

  Args:
    updates: the samples of each update (only those merge with one another),
      an episode's in the order of its requests. One whose `episode` is empty
      has no predecessor.
    merge_ratio: request tokens / unique tokens, as packed.
    limit: share of the possible ratio under which merging has collapsed.

  Returns:
    Both ratios; with the cause where merging has collapsed.
  """
  chains_of = [_chains(samples) for samples in updates if samples]
  every = list(itertools.chain.from_iterable(chains_of))
  followers = sum(map(len, every)) - len(every)
  if not followers:
    return Sharing(merge_ratio, merge_ratio, None)
  requested, unique = np.sum([_count(chains) for chains in chains_of], 0)
  possible = max(float(requested / unique), merge_ratio)
  cause = None
  if merge_ratio < limit * possible:
    forks = [fork for chain in every for fork in _forks(chain)]
    cause = _cause(forks, followers)
  return Sharing(merge_ratio, possible, cause)


def _chains(samples: Iterable[types.Sample]) -> list[Chain]:
  chains: dict[str, list[types.Sample]] = {}
  for sample in samples:
    chains.setdefault(sample.episode or sample.name, []).append(sample)
  return list(chains.values())


def _inputs(sample: types.Sample) -> int:
  """Tokens whose hidden states are needed: all but the last."""
  return len(sample.prompt_ids) + max(len(sample.response_ids) - 1, 0)


def _count(chains: Sequence[Chain]) -> tuple[int, int]:
  """Request tokens, and the distinct ones if all extended predecessors."""
  samples = [sample for chain in chains for sample in chain]
  prompts = np.array([len(sample.prompt_ids) for sample in samples])
  responses = np.array([len(sample.response_ids) for sample in samples])
  sizes = prompts + np.maximum(responses - 1, 0)  # as `_inputs`
  before = np.roll(sizes, 1)
  first = np.cumsum([0, *map(len, chains[:-1])])
  roots = [np.empty(0, np.int32), *(chain[0].prompt_ids for chain in chains)]
  before[first] = [merge.common_prefix(*p) for p in itertools.pairwise(roots)]
  # A response is new, however short the prompt has become.
  new = sizes - np.minimum(before, prompts)
  return sizes.sum(), new.sum()


def _forks(chain: Chain) -> Iterator[_Fork]:
  """The requests of an episode that do not extend their predecessor."""
  starts = np.array([len(sample.prompt_ids) - _OPENING for sample in chain])
  for i in range(1, len(chain)):
    before, request = chain[i - 1], chain[i]
    could = min(_inputs(before), len(request.prompt_ids))
    depth = merge.common_prefix(before.prompt_ids, request.prompt_ids)
    if depth == len(before.prompt_ids):
      rest = request.prompt_ids[depth:]
      depth += merge.common_prefix(before.response_ids, rest)
    if depth >= could:
      continue
    turn = int(np.count_nonzero(starts[:i] <= depth))
    if depth >= starts[i - 1]:
      skips = _skips(before, request.prompt_ids, depth)
      reason = Reason.LEFT_OUT if skips else Reason.RESPONSE
    elif turn == 0:
      reason = Reason.PROMPT
    elif _inputs(request) < _inputs(before):
      reason = Reason.COMPACTED
    else:
      reason = Reason.HISTORY
    yield _Fork(reason, depth, turn, could - depth)


def _skips(before: types.Sample, prompt_P: np.ndarray, depth: int) -> bool:
  """Whether the prompt goes on with a later part of the response before it."""
  goes_on = prompt_P[depth : depth + _SAME]
  later = before.response_ids[max(depth - len(before.prompt_ids), 0) :]
  if len(goes_on) < _SAME or len(later) < _SAME:
    return False
  windows = np.lib.stride_tricks.sliding_window_view(later, _SAME)
  return bool((windows == goes_on[None]).all(1).any())


def _cause(forks: Sequence[_Fork], followers: int) -> Cause | None:
  lost = {
    reason: sum(fork.lost for fork in forks if fork.reason == reason)
    for reason in Reason
  }
  reason = max(lost, key=lost.__getitem__)
  found = [fork for fork in forks if fork.reason == reason]
  if not found:
    return None
  depths = [fork.depth for fork in found]
  return Cause(
    reason=reason,
    share=len(found) / followers,
    depth=int(np.quantile(depths, 0.9, method="higher")) + 1,
    turn=int(np.median([fork.turn for fork in found])),
  )
