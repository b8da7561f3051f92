"""How many tokens to draft for a step: what pays, by measurement; no JAX.

A step that also verifies k drafts of each sequence takes longer than a plain
one. What it yields depends on how often drafts are accepted:

  tokens(k) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k    a sequence
  worth(k) = tokens(k) / seconds(k)

where a_i is the share of i-th drafts that are accepted, of those whose
predecessors were, and seconds(k) is a median over the last such steps of as
many sequences. The length worth most is taken: 0, no drafting at all, if no
other is worth more. Invariants:
  - What is known of acceptance fades, so that new weights or other requests
    soon count.
  - Every length is tried once in so many steps of a bucket, and no more often
    unless it is taken: what has come to pay is noticed, at a bounded cost.
"""

import bisect
import collections
from collections.abc import Mapping, Sequence
import math
import statistics

_AGAIN = 400  # steps of a bucket after which every length is tried once more
_LAST = 5  # steps whose median is a length's cost
_FADE = 0.99  # of what is known of acceptance, at every step
_GUESS = 0.25, 2.0  # acceptance before any is known, and its weight in drafts
_LEAST_GAIN = 1.02  # of what a length is worth over a plain step


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
    self._buckets = [_Bucket(most) for _ in buckets]
    self._most = most
    self._offered, self._right = [0.0] * most, [0.0] * most
    self._decoded = self._verified = self._drafted = self._accepted = 0
    self._seconds = self._plain_seconds = 0.0

  def length(self, rows: int) -> int:
    """How many tokens to draft for each of `rows` sequences."""
    if not self._most or not rows:
      return 0
    if not self._adaptive:
      return self._most
    bucket = self._bucket(rows)
    overdue = bucket.overdue()
    if overdue is not None:
      return overdue
    worth = [n / bucket.seconds(k) for k, n in enumerate(self._tokens())]
    best = max(range(1, self._most + 1), key=worth.__getitem__)
    return best if worth[best] > worth[0] * _LEAST_GAIN else 0

  def record(
    self,
    drafts: Sequence[int],
    taken: Sequence[Sequence[int]],
    seconds: float,
  ) -> None:
    """Takes in what steps without blocks yielded and cost.

    Args:
      drafts: of each sequence, in each of the steps.
      taken: by step and sequence, the tokens that counted: 1 + accepted drafts.
      seconds: of all the steps.
    """
    if not self._most:
      return
    steps, rows, length = len(taken), len(drafts), max(drafts)
    bucket = self._bucket(rows)
    bucket.record(length, seconds / steps, steps)
    fade = _FADE**steps
    pairs = [pair for some in taken for pair in zip(drafts, some, strict=True)]
    for n in range(self._most):
      reached = [count for most, count in pairs if most > n and count > n]
      self._offered[n] = fade * self._offered[n] + len(reached)
      self._right[n] *= fade
      self._right[n] += sum(count > n + 1 for count in reached)
    tokens = sum(map(sum, taken))
    self._decoded += steps * rows
    self._drafted += steps * sum(drafts)
    self._accepted += tokens - steps * rows
    self._seconds += seconds
    plain = bucket.seconds(0) * tokens / rows
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

  def _bucket(self, rows: int) -> "_Bucket":
    return self._buckets[bisect.bisect_left(self._rows, rows)]

  def _tokens(self) -> list[float]:
    """Tokens that a sequence goes on by, for every length from 0 on."""
    share, weight = _GUESS
    tokens, all_right = [1.0], 1.0
    for offered, right in zip(self._offered, self._right, strict=True):
      all_right *= (right + share * weight) / (offered + weight)
      tokens.append(tokens[-1] + all_right)
    return tokens


class _Bucket:
  """What steps of about as many sequences cost, by their number of drafts."""

  def __init__(self, most: int):
    self._steps = 0
    self._seconds = [collections.deque(maxlen=_LAST) for _ in range(most + 1)]
    self._tried = [-_AGAIN] * (most + 1)  # the step of the last time

  def overdue(self) -> int | None:
    """A length that was not tried for long, or never; notes that it is."""
    for length, last in enumerate(self._tried):
      if self._steps - last >= _AGAIN:
        self._tried[length] = self._steps
        return length
    return None

  def record(self, length: int, seconds: float, steps: int) -> None:
    """Notes what a step cost."""
    self._steps += steps
    self._tried[length] = self._steps
    self._seconds[length].append(seconds)

  def seconds(self, length: int) -> float:
    """What a step costs; infinite if none was measured."""
    some = self._seconds[length]
    return statistics.median(some) if some else math.inf
