"""What the next engine step computes; plain Python, no device.

A step is schedule -> run -> commit: one token of each decoding sequence and
some blocks of prompt tokens; or without blocks, of each decoding sequence a
token and the drafts after it that turn out right, several times over when
nobody waits for anything else. Invariants:
  - A request waits, then is live and holds a lease on pages, then is finished.
    A live one that loses its pages (preempted) waits again with the tokens it
    has; it is prefilled anew but for what the prefix cache still holds.
  - Requests are admitted by priority; within one, those of the session that was
    served fewest tokens first (virtual token counters: Sheng et al., 2024,
    arXiv 2401.00588); within a session, in order of arrival. One that would
    recompute a prefix that a live sequence is about to commit waits for it.
  - A live sequence is prefilling while tokens below `fill` are missing from the
    cache, else decoding: then all but its last token are in it.
  - One request alone always fits: the pages hold a full context.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools

from forge_jax import types
from forge_jax.engine import api, prefix_cache

_SESSIONS = 4096  # most sessions whose served tokens are remembered


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """How steps are composed."""

  slots: int = 64  # most live requests
  context: int = 512  # most tokens of a sequence, prompt and response
  blocks: int = 16  # most blocks of prompt tokens in a step
  block: int = 16  # prompt tokens of a block
  step_tokens: int = 0  # most tokens of a step; 0: as many as fit its shapes
  # Prefilling sequences wait for a full step, but no more decode steps than
  # this.
  prefill_patience: int = 4
  decode_steps: int = 1  # most steps that decode at once when nobody waits


class LiveRequest:
  """A request and its progress; owned by the scheduler."""

  def __init__(self, request: api.GenerateRequest, number: int):
    self.request = request
    self.prompt = request.prompt_ids.tolist()
    self.response: list[int] = []
    self.number = number  # in order of arrival
    self.fill = len(self.prompt)
    self.lease: prefix_cache.Lease | None = None
    self.sure = 0  # last tokens in a row that were all but certain
    sampling = request.sampling
    # Whether the host shapes each token's distribution by those before it.
    self.stepwise = bool(
      sampling.grammar
      or sampling.top_logprobs
      or sampling.logit_bias
      or sampling.presence_penalty
      or sampling.frequency_penalty
      or sampling.repetition_penalty != 1
    )

  @property
  def session(self) -> str:
    """Whose turn it takes: a request without a session is one of its own."""
    return self.request.session or self.request.id

  @property
  def committed(self) -> int:
    """Tokens whose keys and values are in the cache."""
    return self.lease.length if self.lease else 0

  @property
  def length(self) -> int:
    """Prompt and response tokens so far."""
    return len(self.prompt) + len(self.response)

  @property
  def prefilling(self) -> bool:
    """Whether tokens before the last sampled one are missing."""
    return self.committed < self.fill

  def left(self, context: int) -> int:
    """How many more tokens it may be given."""
    most = self.request.sampling.max_tokens - len(self.response)
    return min(most, context - self.length)

  def tokens(self, start: int, end: int) -> list[int]:
    """Prompt and response tokens, by position."""
    size = len(self.prompt)
    return (
      self.prompt[start:end]
      + self.response[max(start - size, 0) : max(end - size, 0)]
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
  """Some tokens of a sequence that is being prefilled."""

  live: LiveRequest
  start: int  # position of the first
  tokens: list[int]
  last: bool  # whether a token is to be sampled after it


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
  """One engine step."""

  decode: tuple[LiveRequest, ...]
  drafts: tuple[int, ...]  # of each of `decode`; none beside blocks
  blocks: tuple[Block, ...]
  decode_steps: int  # how often each of `decode` goes on
  moves: tuple[prefix_cache.Move, ...]  # pages to copy first


class Scheduler:
  """Waiting and live requests, and the prefix cache they share."""

  def __init__(
    self,
    config: SchedulerConfig,
    cache: prefix_cache.PrefixCache,
    draft_length: Callable[[int, int], int] = lambda rows, steps: 0,
  ):
    """No requests yet.

    Args:
      config: how steps are composed.
      cache: empty.
      draft_length: how many tokens to draft for each of so many sequences, in
        so many steps at once.
    """
    self.config = config
    self.cache = cache
    self._draft_length = draft_length
    self._waiting: dict[str, LiveRequest] = {}
    self._live: dict[str, LiveRequest] = {}
    self._number = itertools.count()
    self._served: dict[str, int] = {}  # tokens, by session
    self._delayed = 0  # decode steps since prefilling sequences began to wait
    self.reused_tokens = 0
    self.prompt_tokens = 0
    self.preempted = 0

  def __len__(self) -> int:
    return len(self._waiting) + len(self._live)

  @property
  def waiting(self) -> int:
    """Requests that hold no pages."""
    return len(self._waiting)

  def add(self, request: api.GenerateRequest) -> None:
    """Queues a request."""
    live = LiveRequest(request, next(self._number))
    # A session that was away does not make up for it.
    active = [*self._waiting.values(), *self._live.values()]
    least = min((self._served[r.session] for r in active), default=0)
    served = max(self._served.pop(live.session, 0), least)
    self._served[live.session] = served
    if len(self._served) > _SESSIONS + len(active):
      busy = {r.session for r in active}
      idle = next(s for s in self._served if s not in busy)
      del self._served[idle]
    self._waiting[request.id] = live

  def schedule(self) -> Step | None:
    """Admits what can be admitted and picks the next step; None: idle."""
    self._admit()
    prefilling = [r for r in self._live.values() if r.prefilling]
    decoding = [r for r in self._live.values() if not r.prefilling]
    blocks = self._blocks(sorted(prefilling, key=self._order), len(decoding))
    full = len(blocks) == self.config.blocks
    if decoding and not full and self._delayed < self.config.prefill_patience:
      self._delayed += bool(blocks)
      blocks = []
    else:
      self._delayed = 0
    alone = not prefilling and not self._waiting
    steps = self._decode_steps(decoding) if alone else 1
    drafts = 0 if blocks else self._drafts(len(decoding), steps)
    steps = min(steps, self._decode_steps(decoding, 1 + drafts))
    if not all(self._reserve(live, steps * (1 + drafts)) for live in decoding):
      steps, drafts = 1, 0  # rather than preempt anybody
    decoding = self._extend(decoding)
    if not decoding and not blocks:
      # All that decoded was preempted; or nothing is live.
      return self.schedule() if self._live else None
    # What was preempted for the decoding ones is prefilled later.
    blocks = [block for block in blocks if block.live.lease is not None]
    context = self.config.context
    return Step(
      tuple(decoding),
      tuple(min(drafts, live.left(context) - 1) for live in decoding),
      tuple(blocks),
      steps,
      tuple(self.cache.take_moves()),
    )

  def commit(
    self, step: Step, tokens: Sequence[int], index: int = 0
  ) -> list[tuple[LiveRequest, int]]:
    """Records one token of each row of a step that has run.

    Args:
      step: what ran.
      tokens: the token sampled after each row: those of `step.decode`, then
        those of `step.blocks`; -1 where there is none.
      index: how many tokens of a row there may have been before these.

    Returns:
      (request, row) for each row whose sampled token counts. A request that was
      finished meanwhile has none.
    """
    sampled = []
    for row, live in enumerate(step.decode):
      if live.lease is not None and tokens[row] >= 0:
        self._advance(live, live.response[-1:])
        sampled.append((live, row))
    if index == 0:
      for row, block in enumerate(step.blocks, len(step.decode)):
        if block.live.lease is not None:
          self._advance(block.live, block.tokens)
          if block.last:
            sampled.append((block.live, row))
    for live, row in sampled:
      live.response.append(int(tokens[row]))
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
    """Ends a request wherever it is; what it committed stays for others."""
    self._waiting.pop(request_id, None)
    live = self._live.pop(request_id, None)
    if live is not None:
      self._release(live)

  def forget(self, *, recompute: bool = False) -> None:
    """Makes sure that nothing computed so far serves a further prompt.

    Requests without a sampled token are prefilled anew; the others keep what
    they have, unless they are to be recomputed.
    """
    self.cache.forget()
    for live in list(self._live.values()):
      if recompute or not live.response:
        self._put_back(live)

  def _order(self, live: LiveRequest) -> tuple[int, int, int]:
    """Who comes first: the smallest."""
    return -live.request.priority, self._served[live.session], live.number

  def _admit(self) -> None:
    """Makes waiting requests live, in their order, as far as there is room."""
    for live in sorted(self._waiting.values(), key=self._order):
      if len(self._live) >= self.config.slots and not self._make_room(live):
        return
      if self._worth_waiting(live):
        continue
      while not self._start(live):
        if not self._make_room(live):
          return

  def _make_room(self, live: LiveRequest) -> bool:
    """Preempts a request of lower priority than a waiting one's."""
    worst = max(self._live.values(), key=self._order, default=None)
    if worst is None or worst.request.priority >= live.request.priority:
      return False
    self._preempt(worst)
    return True

  def _start(self, live: LiveRequest) -> bool:
    """Gives a request its pages; False: there are not enough."""
    tokens = live.tokens(0, live.length)
    lease = self.cache.acquire(tokens)
    reused = lease.length
    if not self.cache.reserve(lease, len(tokens)):
      self.cache.release(lease)
      return False
    live.lease, live.fill = lease, len(tokens)
    del self._waiting[live.request.id]
    self._live[live.request.id] = live
    self.prompt_tokens += len(tokens)
    self.reused_tokens += reused
    return True

  def _worth_waiting(self, live: LiveRequest) -> bool:
    """Whether a prefilling sequence will soon hold more of the tokens."""
    tokens = live.tokens(0, live.length)
    coming = 0
    for other in self._live.values():
      if other.prefilling:
        theirs = other.tokens(0, other.fill)
        coming = max(coming, prefix_cache.common_prefix(theirs, tokens))
    if coming < self.config.block:
      return False
    have = self.cache.shared(tokens)
    return min(coming, len(tokens) - 1) - have >= self.config.block

  def _blocks(
    self, prefilling: Sequence[LiveRequest], decoding: int
  ) -> list[Block]:
    """The next tokens of the prefilling sequences, in blocks."""
    config, blocks = self.config, []
    room = config.blocks
    if config.step_tokens:
      left = config.step_tokens - decoding
      room = max(min(room, left // config.block), 1)
    for live in prefilling:
      for start in range(live.committed, live.fill, config.block):
        if len(blocks) == room:
          return blocks
        end = min(start + config.block, live.fill)
        tokens = live.tokens(start, end)
        blocks.append(Block(live, start, tokens, end == live.fill))
    return blocks

  def _drafts(self, decoding: int, steps: int) -> int:
    """How many tokens to draft for each decoding sequence."""
    drafts, most = self._draft_length(decoding, steps), self.config.step_tokens
    return (
      min(drafts, max(most // decoding - 1, 0)) if drafts and most else drafts
    )

  def _decode_steps(
    self, decoding: Sequence[LiveRequest], tokens: int = 1
  ) -> int:
    """How often all may go on, by so many tokens, before the host sees one."""
    most = self.config.decode_steps
    for live in decoding:
      if live.stepwise:
        return 1
      most = min(most, live.left(self.config.context) // tokens)
    return max(most, 1)

  def _reserve(self, live: LiveRequest, tokens: int) -> bool:
    """Provides pages for the next tokens, as far as there may be any."""
    tokens = min(tokens, live.left(self.config.context))
    return self.cache.reserve(live.lease, live.committed + tokens)

  def _extend(self, decoding: Sequence[LiveRequest]) -> list[LiveRequest]:
    """Provides pages for a token each; preempts the last where it must."""
    decoding = sorted(decoding, key=self._order)
    for live in decoding:
      while live.lease is not None and not self._reserve(live, 1):
        self._preempt(max(self._live.values(), key=self._order))
    return [live for live in decoding if live.lease is not None]

  def _advance(self, live: LiveRequest, tokens: Sequence[int]) -> None:
    self.cache.commit(live.lease, tokens)
    self._served[live.session] += len(tokens)

  def _preempt(self, live: LiveRequest) -> None:
    self.preempted += 1
    self._put_back(live)

  def _put_back(self, live: LiveRequest) -> None:
    """Makes a live request wait again, with the tokens it has."""
    del self._live[live.request.id]
    self._release(live)
    self._waiting[live.request.id] = live

  def _release(self, live: LiveRequest) -> None:
    self.cache.release(live.lease)
    live.lease = None
