"""Which sequences the next engine step works on; plain Python, no device.

A step is schedule -> run -> commit. Invariants:
  - A request waits, then is live in one slot, then is finished; requests are
    admitted in order of arrival, but for one that would recompute a prefix
    that a live sequence is about to commit: it is passed over until then.
  - A live sequence is prefilling while more than its last token is missing
    from the cache, else decoding.
  - Sampled tokens are appended by `commit` only, with the weight version that
    the step ran under.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import time

import numpy as np

from forge_jax import types
from forge_jax.engine import api
from forge_jax.engine import slots as slots_lib


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """How steps are composed."""

  slots: int = 64
  context: int = 512
  prefill_rows: int = 16  # most rows of a prefill step
  prefill_chunk: int = 16
  # Prefilling rows wait for a full prefill step, but no more decode steps than
  # this.
  prefill_patience: int = 4


class LiveRequest:
  """A request and its progress; owned by the scheduler."""

  def __init__(self, request: api.GenerateRequest):
    self.request = request
    self.prompt = np.asarray(request.prompt_ids, np.int32)
    self.response: list[int] = []
    self.slot = -1
    self.committed = 0  # tokens whose keys and values are in the cache
    self.arrived = time.monotonic()

  @property
  def length(self) -> int:
    """Prompt and response tokens so far."""
    return len(self.prompt) + len(self.response)

  @property
  def prefilling(self) -> bool:
    """Whether prompt tokens are still to be computed."""
    return self.committed < len(self.prompt)

  def next_tokens(self, limit: int) -> np.ndarray:
    """The next tokens to compute, at most `limit`, int32."""
    if self.prefilling:
      return self.prompt[self.committed : self.committed + limit]
    return np.asarray(self.response[-1:], np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
  """One engine step: rows of equal kind."""

  rows: tuple[LiveRequest, ...]
  width: int  # most new tokens of a row: 1, or the prefill chunk
  copies: tuple[tuple[int, int], ...]  # cache rows to copy first


class Scheduler:
  """Waiting requests, live sequences and the slots they hold."""

  def __init__(self, config: SchedulerConfig):
    self.config = config
    self.ledger = slots_lib.SlotLedger(config.slots, config.context)
    self._waiting: dict[str, LiveRequest] = {}
    self._live: dict[str, LiveRequest] = {}
    self._delayed = 0  # decode steps since prefilling rows began to wait
    self.reused_tokens = 0
    self.prompt_tokens = 0

  def __len__(self) -> int:
    return len(self._waiting) + len(self._live)

  @property
  def waiting(self) -> int:
    """Requests without a slot."""
    return len(self._waiting)

  def add(self, request: api.GenerateRequest) -> None:
    """Queues a request."""
    self._waiting[request.id] = LiveRequest(request)

  def schedule(self) -> Step | None:
    """Admits what can be admitted and picks the next step; None: idle."""
    copies = tuple(self._admit())
    prefilling = [r for r in self._live.values() if r.prefilling]
    decoding = [r for r in self._live.values() if not r.prefilling]
    full = len(prefilling) >= self.config.prefill_rows
    patient = decoding and self._delayed < self.config.prefill_patience
    if prefilling and (full or not patient):
      self._delayed = 0
      rows = prefilling[: self.config.prefill_rows]
      return Step(tuple(rows), self.config.prefill_chunk, copies)
    if decoding:
      self._delayed += bool(prefilling)
      return Step(tuple(decoding), 1, copies)
    return None

  def commit(
    self, step: Step, tokens: Sequence[int]
  ) -> list[tuple[LiveRequest, int]]:
    """Records a step that has run.

    Args:
      step: what ran.
      tokens: the token sampled after each row.

    Returns:
      (request, row) for each row whose sampled token counts: those whose whole
      prompt is now computed.
    """
    sampled = []
    for row, live in enumerate(step.rows):
      new = live.next_tokens(step.width)
      self.ledger.commit(live.slot, new)
      live.committed += len(new)
      if not live.prefilling:
        live.response.append(int(tokens[row]))
        sampled.append((live, row))
    return sampled

  def stop_reason(self, live: LiveRequest) -> types.StopReason | None:
    """Whether the last sampled token ends a request, stop strings aside."""
    sampling = live.request.sampling
    if live.response[-1] in sampling.stop_token_ids:
      return types.StopReason.STOP
    if len(live.response) >= sampling.max_tokens:
      return types.StopReason.LENGTH
    if live.length >= self.config.context:
      return types.StopReason.LENGTH
    return None

  def finish(self, request_id: str) -> None:
    """Ends a request wherever it is; its slot becomes idle."""
    self._waiting.pop(request_id, None)
    live = self._live.pop(request_id, None)
    if live is not None:
      self.ledger.release(live.slot)

  def forget(self) -> None:
    """Makes sure that nothing computed so far serves a further prompt.

    Requests without a sampled token are prefilled anew; the others keep what
    they have.
    """
    self.ledger.forget()
    for live in self._live.values():
      if not live.response:
        live.committed = 0
        self.ledger.restart(live.slot)

  def _admit(self) -> Iterator[tuple[int, int]]:
    """Gives slots to waiting requests; yields the cache rows to copy."""
    for live in list(self._waiting.values()):
      if self.ledger.live == self.config.slots:
        return
      if self._worth_waiting(live.prompt):
        continue
      slot, donor, reused = self.ledger.acquire(live.prompt)
      live.slot, live.committed = slot, reused
      del self._waiting[live.request.id]
      self._live[live.request.id] = live
      self.prompt_tokens += len(live.prompt)
      self.reused_tokens += reused
      if donor != slot:
        yield donor, slot

  def _worth_waiting(self, prompt: np.ndarray) -> bool:
    """Whether a prefilling sequence will soon hold more of the prompt."""
    coming = 0
    for other in self._live.values():
      if other.prefilling:
        coming = max(coming, common_prefix(other.prompt, prompt))
    have = int(self.ledger.shared(prompt).max())
    return min(coming, len(prompt) - 1) - have >= self.config.prefill_chunk


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
  """Length of the longest common prefix of two int arrays."""
  width = min(len(a), len(b))
  differs = a[:width] != b[:width]
  return int(differs.argmax()) if differs.any() else width
