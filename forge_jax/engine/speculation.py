"""How many tokens to draft for a step: what pays, by measurement; no JAX.

A round is what the host sends off at once: a step, or several while nobody
waits. What a step yields depends on how often drafts are accepted, what it costs
on their number k:

  tokens(k) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k    a sequence
  worth(k) = tokens(k) / seconds(k)

where a_i is the share of i-th drafts that are accepted, of those whose
predecessors were, and seconds(k) a median over the last rounds with k drafts,
of as many sequences: time as users see it, from the end of one round to the end
of the next, the host's work included. The rule:

  1. The length worth most of those timed in three rounds is taken; 0 where none
     is worth 3% more than that.
  2. After seven plain rounds, of which the first may be slow, the others are
     tried in turn, a round each, with one of the best between. A try is made
     when what it is expected to lose has been put by: 1% of all time, and four
     plain steps at first. So tries cost no more than that, however dear drafts
     are, and what has come to pay is noticed.

What is known of acceptance fades as drafts are verified, so that new weights or
other requests soon count.
"""

import bisect
import collections
from collections.abc import Mapping, Sequence
import math
import statistics

_FIRST = 3  # rounds of a length before its cost is believed
_LAST = 7  # rounds whose median is a length's cost; plain ones at first
_SPARE = 0.01  # of the time, for tries
_CREDIT = 4.0  # for tries at first, in plain steps
_DRAFT = 0.5  # what a draft costs until that is known, in plain steps
_MEMORY = 50.0  # drafts at one place whose acceptance is remembered
_GUESS = 0.25, 2.0  # acceptance before any is known, and its weight in drafts
_LEAST_GAIN = 1.03  # of what a length is worth over a plain step


class Speculation:
  """Measures steps that decode, and says how many tokens to draft."""

  def __init__(
    self, buckets: Sequence[int], most: int, *, adaptive: bool = True
  ):
    """Knows nothing yet.

    Args:
      buckets: numbers of sequences that steps are compiled for, ascending.
      most: the largest number of drafts; 0: there is nothing that drafts.
      adaptive: whether fewer than that are drafted where it is faster.
    """
    self._adaptive = adaptive
    self._rows = list(buckets)
    # Of a single step and of several at once, which cost less each.
    self._costs = [(_Costs(most), _Costs(most)) for _ in buckets]
    self._most = most
    self._offered, self._right = [0.0] * most, [0.0] * most
    self._decoded = self._verified = self._drafted = self._accepted = 0
    self._seconds = self._plain_seconds = 0.0

  def length(self, rows: int, steps: int = 1) -> int:
    """How many tokens to draft for each of `rows` sequences.

    Args:
      rows: how many go on in the next round.
      steps: of that round, at most.
    """
    if not self._most or not rows:
      return 0
    if not self._adaptive:
      return self._most
    return self._costs_of(rows, steps).choose(self._tokens(), steps)

  def record(
    self,
    drafts: Sequence[int],
    taken: Sequence[Sequence[int]],
    seconds: float,
  ) -> None:
    """Takes in what a round without blocks yielded and cost.

    Args:
      drafts: of each sequence, in each of the steps.
      taken: by step and sequence, the tokens that counted: 1 + accepted drafts.
      seconds: since the round before ended.
    """
    if not self._most:
      return
    steps, rows, length = len(taken), len(drafts), max(drafts)
    costs = self._costs_of(rows, steps)
    costs.record(length, seconds, steps)
    pairs = [pair for some in taken for pair in zip(drafts, some, strict=True)]
    for n in range(self._most):
      reached = [count for most, count in pairs if most > n and count > n]
      keep = _MEMORY / (_MEMORY + len(reached))
      self._offered[n] = keep * (self._offered[n] + len(reached))
      right = sum(count > n + 1 for count in reached)
      self._right[n] = keep * (self._right[n] + right)
    tokens = sum(map(sum, taken))
    self._decoded += steps * rows
    self._drafted += steps * sum(drafts)
    self._accepted += tokens - steps * rows
    self._seconds += seconds
    plain = costs.seconds(0) * tokens / rows
    if length and plain < math.inf:
      self._plain_seconds += plain
    else:
      self._plain_seconds += seconds
    self._verified += steps * rows if length else 0

  def stats(self) -> Mapping[str, float]:
    """Totals for `Engine.stats`; empty if there is nothing that drafts.

    Of steps without blocks: `decoded_rows`, their sequences, each as often as it
    went on, and `verified_rows`, those with drafts; tokens drafted and accepted;
    `decode_seconds`, and what plain steps would have taken for as many tokens.
    """
    if not self._most:
      return {}
    return {
      "decoded_rows": self._decoded,
      "verified_rows": self._verified,
      "drafted_tokens": self._drafted,
      "accepted_tokens": self._accepted,
      "decode_seconds": self._seconds,
      "plain_decode_seconds": self._plain_seconds,
    }

  def _costs_of(self, rows: int, steps: int) -> "_Costs":
    return self._costs[bisect.bisect_left(self._rows, rows)][steps > 1]

  def _tokens(self) -> list[float]:
    """Tokens that a sequence goes on by, for every length from 0 on."""
    share, weight = _GUESS
    tokens, all_right = [1.0], 1.0
    for offered, right in zip(self._offered, self._right, strict=True):
      all_right *= (right + share * weight) / (offered + weight)
      tokens.append(tokens[-1] + all_right)
    return tokens


class _Costs:
  """What steps of about as many sequences cost, by their number of drafts."""

  def __init__(self, most: int):
    self._seconds = [collections.deque(maxlen=_LAST) for _ in range(most + 1)]
    self._chosen = [0] * (most + 1)  # the last round of each length
    self._tries = [0] * (most + 1)
    self._rounds = 0
    self._spare = 0.0  # seconds for tries
    self._trying = False  # in the last round

  def choose(self, tokens: Sequence[float], steps: int) -> int:
    """The length for a round of so many steps.

    Args:
      tokens: that a sequence goes on by in a step, for every length from 0 on.
      steps: of the round.
    """
    length = self._best(tokens)
    if len(self._seconds[0]) == _LAST and not self._trying:
      length = self._try(tokens, steps, length)
    else:
      self._trying = False
    self._rounds += 1
    self._chosen[length] = self._rounds
    return length

  def record(self, length: int, seconds: float, steps: int) -> None:
    """Notes what a round cost."""
    self._seconds[length].append(seconds / steps)
    self._spare += _SPARE * seconds

  def seconds(self, length: int) -> float:
    """What a step costs; infinite if none was measured."""
    some = self._seconds[length]
    return statistics.median_low(some) if some else math.inf

  def _known(self, length: int) -> bool:
    return len(self._seconds[length]) >= _FIRST

  def _best(self, tokens: Sequence[float]) -> int:
    worth = [
      n / self.seconds(k) if self._known(k) else 0.0
      for k, n in enumerate(tokens)
    ]
    best = max(range(len(worth)), key=worth.__getitem__)
    return best if worth[best] > worth[0] * _LEAST_GAIN else 0

  def _try(self, tokens: Sequence[float], steps: int, best: int) -> int:
    """The length whose turn it is, if a try can be afforded; else the best."""
    others = [k for k in range(len(tokens)) if k != best]
    new = [k for k in others if self._tries[k] < _FIRST]
    other = new[0] if new else min(others, key=self._chosen.__getitem__)
    lost = (
      self._guess(other) - tokens[other] * self.seconds(best) / tokens[best]
    )
    lost = max(steps * lost, 0.0)
    if lost > self._spare + _CREDIT * self.seconds(0):
      return best
    self._spare -= lost
    self._tries[other] += 1
    self._trying = True
    return other

  def _guess(self, length: int) -> float:
    """What a step will cost; what a hiccup made of the first is not believed."""
    if self._known(length):
      return self.seconds(length)
    plain = self.seconds(0)
    known = max(k for k in range(length) if self._known(k))
    draft = (self.seconds(known) - plain) / known if known else _DRAFT * plain
    return min(self.seconds(length), plain + length * draft)
