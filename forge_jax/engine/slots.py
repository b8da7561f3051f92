"""The ledger of cache slots: which tokens' keys and values each slot holds.

Invariants:
  - `length[s]` tokens of slot s are committed: their keys and values are in
    the cache. Only committed tokens are ever reused.
  - A slot is live (a sequence extends it) or idle (kept for reuse). An idle
    slot is overwritten least recently used first.
  - After `forget` nothing computed before it is reused: idle slots are empty,
    live ones are stale, of use to their own sequence only.
"""

import numpy as np


class SlotLedger:
  """Plain bookkeeping; the cache itself is the runner's."""

  def __init__(self, slots: int, context: int):
    self._tokens = np.full((slots, context), -1, np.int32)
    self._length = np.zeros(slots, np.int64)
    self._live = np.zeros(slots, bool)
    self._stale = np.zeros(slots, bool)
    self._used = np.zeros(slots, np.int64)  # clock of the last use
    self._clock = 0

  @property
  def live(self) -> int:
    """Number of live slots."""
    return int(self._live.sum())

  def shared(self, prompt: np.ndarray) -> np.ndarray:
    """Reusable tokens each slot shares with the prompt's start, int [S]."""
    width = len(prompt)
    differs = self._tokens[:, :width] != prompt[None]
    first = np.where(differs.any(1), differs.argmax(1), width)
    return np.where(self._stale, 0, np.minimum(first, self._length))

  def acquire(self, prompt: np.ndarray) -> tuple[int, int, int] | None:
    """Makes a slot live for a prompt.

    The last prompt token is never reused: its hidden state is needed.

    Args:
      prompt: int32 [P].

    Returns:
      (slot, donor, reused): the first `reused` tokens are, or must be copied
      to be, in the slot; donor == slot when nothing needs copying. None when
      every slot is live.
    """
    idle = np.flatnonzero(~self._live)
    if not len(idle):
      return None
    shared = np.minimum(self.shared(prompt), len(prompt) - 1)
    donor = int(shared.argmax())
    reused = int(shared[donor])
    # An idle slot that holds nothing but a prefix of the prompt is extended in
    # place: it is this conversation's own past.
    own = idle[(shared[idle] == reused) & (self._length[idle] <= reused + 1)]
    if reused and len(own):
      slot = donor = int(own[0])
    else:
      slot = int(idle[self._used[idle].argmin()])
    self._live[slot] = True
    self._length[slot] = reused
    self._tokens[slot, :reused] = prompt[:reused]
    self._touch(slot)
    if reused:
      self._touch(donor)
    return slot, donor, reused

  def commit(self, slot: int, tokens: np.ndarray) -> None:
    """Appends tokens whose keys and values are now in the cache."""
    length = self._length[slot]
    self._tokens[slot, length : length + len(tokens)] = tokens
    self._length[slot] = length + len(tokens)

  def release(self, slot: int) -> None:
    """Makes a slot idle; what it holds stays for reuse."""
    self._live[slot] = False
    if self._stale[slot]:
      self._stale[slot], self._length[slot] = False, 0
    self._touch(slot)

  def forget(self) -> None:
    """Makes sure that nothing committed so far is reused."""
    self._length[~self._live] = 0
    self._stale[self._live] = True

  def restart(self, slot: int) -> None:
    """Empties a live slot, to be computed anew."""
    self._length[slot], self._stale[slot] = 0, False

  def _touch(self, slot: int) -> None:
    self._clock += 1
    self._used[slot] = self._clock
