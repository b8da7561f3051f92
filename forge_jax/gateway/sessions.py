"""A session: what one episode has asked for, and what was sampled.

Invariants:
  1. A request is attached to the deepest completion whose conversation, that is
     its request's messages and the reply that the client was sent, begins the
     request's messages (see `lineages`; a replayed reply need not be what it
     was, see `turns`). Where that cannot be, a new root is made; if the client
     did replay something recorded, the reason is kept and counted.
  2. Numbers are given in the order of requests, from 0, and never reused. A
     request's seed depends on the session's, on the sub-agent that it says it is
     of, and on how many of that one's came before it: not on the order in which
     sub-agents that run at the same time ask.
  3. A completion is recorded before the client can have seen the end of its
     reply. Requests may run at the same time; nothing here awaits but `drain`.
  4. What changes is told to `log`, from which `replay` makes the session again.
"""

import asyncio
import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import time
from typing import Any

import numpy as np

from forge_jax import types
from forge_jax.gateway import (
  addition,
  attempts,
  call_ids,
  forest,
  kinds,
  lineages,
  plans,
  raw_prompts,
  records,
  refusal,
  render,
  rewards,
  stored,
)

# Why a request that replays something recorded does not extend it; further
# reasons are in `lineages`.
TEMPLATE_REWRITES = "template"  # the chat template does not extend its past
REPLY_CUT = "cut"  # a raw prompt goes on before the recorded reply's last token


class Session:
  """One episode's requests, rewards and keys to what it has recorded."""

  def __init__(
    self,
    id: str,
    seed: int,
    sampling: Mapping[str, float],
    *,
    age: float = 0.0,
  ):
    """Opens a session.

    Args:
      id: its name.
      seed: of everything sampled in it.
      sampling: defaults for its requests.
      age: seconds since it was opened first.
    """
    self.id = id
    self.seed = seed
    self.sampling = dict(sampling)
    self.fork_reasons: collections.Counter[str] = collections.Counter()
    self.closed = False
    self.log: Callable[[Mapping[str, Any]], None] = lambda record: None
    self._opened = time.monotonic() - age
    self._requests = 0
    self._by_sub_agent: collections.Counter[str] = collections.Counter()
    self._nodes: dict[int, forest.Node] = {}
    self._running: dict[int, plans.Plan] = {}
    self._idle = asyncio.Event()
    self._idle.set()
    self.attempts = attempts.Attempts()
    self._kinds = kinds.Kinds()
    self._native_ids: dict[str, str] = {}  # of calls, see call_ids
    self._lineages = lineages.Lineages()
    self._raw = raw_prompts.RawPrompts()
    log = lambda record: self.log(record)
    self.rewards = rewards.Rewards(log)
    self.stored = stored.Stored(log)  # what the Responses protocol keeps

  def begin(
    self,
    renderer: render.Renderer,
    messages: types.Messages,
    tools: types.Messages,
    effort: str | None = None,
    attempt: attempts.Attempt | None = None,
    choice: int = 0,
  ) -> plans.Plan:
    """Finds where a request belongs and what its prompt is.

    Every plan must be ended by `record` or `drop`.

    Args:
      renderer: of the model.
      messages: the conversation.
      tools: that the model is shown.
      effort: of reasoning; requests with another do not extend each other.
      attempt: the request at the gateway, of which this is a choice.
      choice: its number.

    Raises:
      Refusal: the session is closed, or the template refuses the messages or
        the tools.
    """
    self.check_open()
    digest = lineages.tools_digest(tools, effort)
    match = self._lineages.find(messages, digest)
    parent, reason, added = match.parent, match.reason, None
    shown = call_ids.as_the_model_knows(
      messages, match.messages, self._native_ids
    )
    if parent is not None:
      added = renderer.extend(
        parent.prompt_ids(),
        parent.response_ids,
        shown[: match.depth],
        shown[match.depth :],
        tools,
        parent.written,
      )
      if added is None:
        parent, reason = None, reason or TEMPLATE_REWRITES
    if added is None:
      added = renderer.render(shown, tools)
    plan = self._start(attempt, parent, reason, added, match, digest)
    return self._asked_by(attempt, choice, plan, messages, tools)

  def begin_raw(
    self,
    renderer: render.Renderer,
    prompt: raw_prompts.Prompt,
    attempt: attempts.Attempt | None = None,
    choice: int = 0,
  ) -> plans.Plan:
    """Finds where a raw prompt belongs and what its token ids are.

    A prompt that goes on where a recorded raw completion ended keeps its ids
    and encodes only the rest. A text does not show the tokens that stopped the
    reply: such a prompt keeps the ids before them, but is a root.

    Every plan must be ended by `record` or `drop`. `attempt` and `choice` are
    those of `begin`.

    Raises:
      Refusal: the session is closed.
    """
    self.check_open()
    parent, kept, rest = self._raw.find(renderer, prompt)
    reason = None
    if parent is not None and len(kept) < len(parent.response_ids):
      rest = [*parent.prompt_ids().tolist(), *kept, *rest]
      parent, reason = None, REPLY_CUT
    rest = addition.Addition.of(rest)
    plan = self._start(attempt, parent, reason, rest, prompt)
    return self._asked_by(attempt, choice, plan, (), ())

  def record(
    self,
    plan: plans.Plan,
    *,
    response_ids: Sequence[int],
    logprobs: Sequence[float],
    versions: Sequence[int],
    stop_reason: types.StopReason,
    reply: types.Message | str | None,
    first_token: float | None = None,
    malformed: bool = False,
    plain: bool = True,
  ) -> None:
    """Records what was sampled.

    Args:
      plan: of the request.
      response_ids: as sampled; `logprobs` (nats) and `versions` (of the
        weights) align.
      stop_reason: why the response ended.
      reply: what will be delivered, for a raw prompt the text; None: nothing.
      first_token: when it was sampled, time.monotonic().
      malformed: whether a tool call was attempted that is none.
      plain: whether the policy's own distribution was sampled from.
    """
    request = plan.request
    if plan.attempt is not None:
      retry_of = plan.attempt.repeats(plan.choice)
      request = dataclasses.replace(request, retry_of=retry_of)
      plan.attempt.record(plan.choice, plan.request_id)
    node = forest.Node(
      number=plan.number,
      name=plan.request_id,
      parent=plan.parent,
      fork_reason=plan.fork_reason,
      added_ids=plan.added_ids,
      response_ids=np.asarray(response_ids, np.int32),
      logprobs=np.asarray(logprobs, np.float32),
      versions=np.asarray(versions, np.int32),
      stop_reason=stop_reason,
      started=plan.started,
      finished=self._clock(),
      first_token=None if first_token is None else first_token - self._opened,
      malformed=malformed,
      plain=plain,
      request=request,
      written=plan.added.written,
    )
    self.log(records.completion(node, plan.asked, plan.tools, reply))
    self._keep(node, plan.asked, plan.tools, reply)
    self.drop(plan)

  def restore(
    self,
    node: forest.Node,
    said: types.Messages | raw_prompts.Prompt,
    tools: bytes,
    reply: types.Message | str | None,
  ) -> None:
    """Records again what another process has recorded.

    Args:
      node: of the forest.
      said: its request's messages, as the model has seen them, or raw prompt.
      tools: see `plans.Plan`.
      reply: see `record`.
    """
    self._requests = max(self._requests, node.number + 1)
    client_ids = node.request.client_ids if node.request else {}
    if sub_agent := client_ids.get(attempts.SUB_AGENT):
      self._by_sub_agent[sub_agent] += 1
    if node.fork_reason is not None:
      self.fork_reasons[node.fork_reason] += 1
    if isinstance(reply, Mapping):
      if node.request and node.request.kind == types.RequestKind.MAIN:
        self._kinds.restore(said)
      said = self._lineages.find(said, tools)
    self._keep(node, said, tools, reply)

  def end(self, attempt: attempts.Attempt, delivered: bool) -> None:
    """Ends a request at the gateway; was the client sent the whole reply?"""
    self.attempts.end(attempt, delivered)
    if attempt.lost and attempt.completions:
      self.log(records.lost(filter(None, attempt.completions)))

  def drop(self, plan: plans.Plan) -> None:
    """Ends a request of which nothing was sampled, or that was recorded."""
    self._running.pop(plan.number, None)
    if not self._running:
      self._idle.set()

  @property
  def running(self) -> tuple[str, ...]:
    """The engine's names of the requests in flight."""
    return tuple(plan.request_id for plan in self._running.values())

  async def drain(self) -> None:
    """Waits until no request is in flight."""
    await self._idle.wait()

  def completions(self) -> tuple[types.Completion, ...]:
    """Everything recorded, in the order it was requested."""
    return forest.completions(self._in_order(), self.attempts.lost)

  def forest_json(self) -> list[dict[str, Any]]:
    """What was recorded so far, as the JSON of `forest.to_json`."""
    return forest.to_json(self._in_order())

  def summary(self) -> dict[str, Any]:
    """Counts of what the session holds, as JSON."""
    return {
      "id": self.id,
      "requests": self._requests,
      "completions": len(self._nodes),
      "running": len(self._running),
      "rewards": len(self.rewards.all),
      "fork_reasons": dict(self.fork_reasons),
    }

  def close(self) -> None:
    """Lets nothing begin any more."""
    self.log({"kind": "closed"})
    self.closed = True

  def _keep(
    self,
    node: forest.Node,
    asked: lineages.Match | raw_prompts.Prompt,
    tools: bytes,
    reply: types.Message | str | None,
  ) -> None:
    self._nodes[node.number] = node
    if isinstance(reply, str):
      self._raw.add(asked, reply, node)
    elif reply is not None:
      self._native_ids |= call_ids.native_ids(reply)
      self._lineages.add(asked, tools, reply, node)

  def check_open(self) -> None:
    """Raises Refusal if the session is closed."""
    if self.closed:
      raise refusal.Refusal(f"session {self.id!r} is closed", status=401)

  def _start(
    self,
    attempt: attempts.Attempt | None,
    parent: forest.Node | None,
    reason: str | None,
    added: addition.Addition,
    asked: lineages.Match | raw_prompts.Prompt,
    tools: bytes = b"",
  ) -> plans.Plan:
    """Numbers a request and counts it as running."""
    number = self._requests
    client_ids = {} if attempt is None else attempt.caller.client_ids
    seed = self._next_seed(client_ids.get(attempts.SUB_AGENT))
    self._requests += 1
    if reason is not None:
      self.fork_reasons[reason] += 1
    plan = plans.Plan(
      number=number,
      request_id=f"{self.id}/{number}",
      seed=seed,
      parent=parent,
      fork_reason=reason,
      added=added,
      asked=asked,
      tools=tools,
      started=self._clock(),
    )
    self._running[number] = plan
    self._idle.clear()
    return plan

  def _next_seed(self, sub_agent: str | None) -> int:
    """The seed of a request; None: no sub-agent's."""
    if sub_agent is None:
      others = self._by_sub_agent.total()
      return request_seed(self.seed, self._requests - others)
    number = self._by_sub_agent[sub_agent]
    self._by_sub_agent[sub_agent] += 1
    return request_seed(self.seed, number, sub_agent)

  def _asked_by(
    self,
    attempt: attempts.Attempt | None,
    choice: int,
    plan: plans.Plan,
    messages: types.Messages,
    tools: types.Messages,
  ) -> plans.Plan:
    """The plan with what is known of its request."""
    if attempt is None:
      return plan
    above = plan.parent and plan.parent.request
    kind = self._kinds.tell(
      messages,
      tools,
      attempt.caller.client_ids,
      parent=above and above.kind,
      replays=plan.fork_reason is not None,
      first=not self._nodes,
    )
    request = attempt.request(kind, self._opened)
    plan = dataclasses.replace(
      plan, request=request, attempt=attempt, choice=choice
    )
    self._running[plan.number] = plan
    return plan

  def _in_order(self) -> list[forest.Node]:
    return [node for _, node in sorted(self._nodes.items())]

  def _clock(self) -> float:
    return time.monotonic() - self._opened


def request_seed(session_seed: int, number: int, sub_agent: str = "") -> int:
  """The seed of an agent's n-th request in a session, in [0, 2**31)."""
  sequence = np.random.SeedSequence([session_seed, number, *sub_agent.encode()])
  return int(sequence.generate_state(1)[0]) & 0x7FFFFFFF
