"""A session: the forest of completions that one episode has asked for.

Invariants:
  1. A node is one completion; its prompt is its parent's prompt and response,
     as sampled, followed by the node's own added ids. Nothing that was sampled
     is ever encoded again.
  2. A request is attached to the deepest node whose conversation, that is its
     request's messages and the reply that the client was sent, begins the
     request's messages. Where that cannot be, a new root is made; if the client
     did replay something recorded, the reason is kept and counted.
  3. Numbers are given in the order of requests, from 0, and never reused; the
     seed of request n depends on the session's seed and n alone.
  4. A node is recorded before the client can have seen the end of its reply.
     Requests may run at the same time; nothing here awaits but `drain`.
"""

import asyncio
import collections
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import time
from typing import Any

import numpy as np

from forge_jax import types
from forge_jax.gateway import raw_prompts, refusal, render, stored

# Why a request that replays something recorded does not extend it.
REPLY_CHANGED = "reply"  # the turn that answers a recorded request differs
HISTORY_CHANGED = "history"  # a recorded reply follows other messages
TOOLS_CHANGED = "tools"  # the same conversation, other tools or effort
TEMPLATE_REWRITES = "template"  # the chat template does not extend its past
REPLY_CUT = "cut"  # a raw prompt goes on before the recorded reply's last token


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Node:
  """One recorded completion."""

  number: int
  parent: "Node | None"
  fork_reason: str | None
  added_ids: np.ndarray  # int32, prompt ids beyond the parent's tokens
  response_ids: np.ndarray  # int32
  logprobs: np.ndarray  # float32, nats
  versions: np.ndarray  # int32
  stop_reason: types.StopReason
  started: float  # seconds since the session was opened
  finished: float  # seconds since the session was opened

  def prompt_ids(self) -> np.ndarray:
    """The whole prompt, int32."""
    pieces = [self.added_ids]
    node = self.parent
    while node is not None:
      pieces += [node.response_ids, node.added_ids]
      node = node.parent
    return np.concatenate(pieces[::-1])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
  """A request that is about to be sampled."""

  number: int
  request_id: str
  seed: int
  parent: Node | None
  fork_reason: str | None
  added_ids: list[int]
  prompt_ids: list[int]
  context: bytes  # digest of the request's messages
  tools: bytes  # digest of its tools
  started: float
  raw: raw_prompts.Prompt | None = None  # instead of messages


class Session:
  """One episode's requests, rewards and keys to what it has recorded."""

  def __init__(self, id: str, seed: int, sampling: Mapping[str, float]):
    """Opens a session; `sampling` holds defaults for its requests."""
    self.id = id
    self.seed = seed
    self.sampling = dict(sampling)
    self.rewards: list[types.Reward] = []
    self.fork_reasons: collections.Counter[str] = collections.Counter()
    self.closed = False  # set once, by the server
    self._opened = time.monotonic()
    self._requests = 0
    self._nodes: dict[int, Node] = {}
    self._running: dict[int, Plan] = {}
    self._idle = asyncio.Event()
    self._idle.set()
    # Digest of a conversation -> digest of its tools -> its latest node.
    self._conversations: dict[bytes, dict[bytes, Node]] = {}
    self._contexts: set[bytes] = set()
    self._replies: set[bytes] = set()
    self._raw = raw_prompts.RawPrompts()
    self.stored = stored.Stored()  # what the Responses protocol keeps

  def begin(
    self,
    renderer: render.Renderer,
    messages: types.Messages,
    tools: types.Messages,
    effort: str | None = None,
  ) -> Plan:
    """Finds where a request belongs and what its prompt is.

    Every plan must be ended by `record` or `drop`. Requests whose templates
    were given another `effort` of reasoning do not extend each other.

    Raises:
      Refusal: the session is closed, or the template refuses the messages or
        the tools.
    """
    self._check_open()
    chain = _chain(messages)
    tools_digest = _digest([tools, effort])
    parent, depth, reason = self._find(messages, chain, tools_digest)
    added = None
    if parent is not None:
      seen = parent.prompt_ids().tolist()
      added = renderer.extend(
        seen,
        parent.response_ids.tolist(),
        messages[:depth],
        messages[depth:],
        tools,
      )
      if added is None:
        parent, reason = None, TEMPLATE_REWRITES
      else:
        prompt = seen + parent.response_ids.tolist() + added
    if added is None:
      prompt = added = renderer.render(messages, tools)
    return self._start(
      parent, reason, added, prompt, context=chain[-1], tools=tools_digest
    )

  def begin_raw(
    self, renderer: render.Renderer, prompt: raw_prompts.Prompt
  ) -> Plan:
    """Finds where a raw prompt belongs and what its token ids are.

    A prompt that goes on where a recorded raw completion ended keeps its ids
    and encodes only the rest. A text does not show the tokens that stopped the
    reply: such a prompt keeps the ids before them, but is a root.

    Every plan must be ended by `record` or `drop`.

    Raises:
      Refusal: the session is closed.
    """
    self._check_open()
    parent, kept, rest = self._raw.find(renderer, prompt)
    reason = None
    if parent is None:
      added = ids = rest
    elif len(kept) == len(parent.response_ids):
      added = rest
      ids = [*parent.prompt_ids().tolist(), *kept, *rest]
    else:
      added = ids = [*parent.prompt_ids().tolist(), *kept, *rest]
      parent, reason = None, REPLY_CUT
    return self._start(parent, reason, added, ids, raw=prompt)

  def record(
    self,
    plan: Plan,
    *,
    response_ids: Sequence[int],
    logprobs: Sequence[float],
    versions: Sequence[int],
    stop_reason: types.StopReason,
    reply: types.Message | str | None,
  ) -> None:
    """Records what was sampled.

    Args:
      plan: of the request.
      response_ids: as sampled; `logprobs` and `versions` align.
      logprobs: nats.
      versions: of the weights.
      stop_reason: why the response ended.
      reply: what will be delivered, for a raw prompt the text; None: nothing.
    """
    node = Node(
      number=plan.number,
      parent=plan.parent,
      fork_reason=plan.fork_reason,
      added_ids=np.asarray(plan.added_ids, np.int32),
      response_ids=np.asarray(response_ids, np.int32),
      logprobs=np.asarray(logprobs, np.float32),
      versions=np.asarray(versions, np.int32),
      stop_reason=stop_reason,
      started=plan.started,
      finished=self._clock(),
    )
    self._nodes[plan.number] = node
    if isinstance(reply, str):
      self._raw.add(plan.raw, reply, node)
    elif reply is not None:
      said = message_digest(reply)
      conversation = _link(plan.context, said)
      self._conversations.setdefault(conversation, {})[plan.tools] = node
      self._contexts.add(plan.context)
      self._replies.add(said)
    self.drop(plan)

  def drop(self, plan: Plan) -> None:
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
    return tuple(
      types.Completion(
        id=self._name(node),
        prompt_ids=node.prompt_ids(),
        response_ids=node.response_ids,
        logprobs=node.logprobs,
        versions=node.versions,
        stop_reason=node.stop_reason,
        parent=self._name(node.parent) if node.parent else None,
        fork_reason=node.fork_reason,
        started=node.started,
        finished=node.finished,
      )
      for _, node in sorted(self._nodes.items())
    )

  def forest(self) -> list[dict[str, Any]]:
    """The forest as JSON: a prompt and a response node per completion.

    A node has id, parent, role, the token_ids it adds, whether they were
    sampled, and the mismatch that kept its request from extending more.
    """
    nodes = []
    for _, node in sorted(self._nodes.items()):
      name = self._name(node)
      nodes.append(
        {
          "id": f"{name}/prompt",
          "parent": self._name(node.parent) if node.parent else None,
          "role": "prompt",
          "token_ids": node.added_ids.tolist(),
          "sampled": False,
          "mismatch": node.fork_reason,
        }
      )
      nodes.append(
        {
          "id": name,
          "parent": f"{name}/prompt",
          "role": "assistant",
          "token_ids": node.response_ids.tolist(),
          "sampled": True,
          "mismatch": None,
        }
      )
    return nodes

  def summary(self) -> dict[str, Any]:
    """Counts of what the session holds, as JSON."""
    return {
      "id": self.id,
      "requests": self._requests,
      "completions": len(self._nodes),
      "running": len(self._running),
      "rewards": len(self.rewards),
      "fork_reasons": dict(self.fork_reasons),
    }

  def _check_open(self) -> None:
    if self.closed:
      raise refusal.Refusal(f"session {self.id!r} is closed", status=401)

  def _start(
    self,
    parent: Node | None,
    reason: str | None,
    added: list[int],
    prompt: list[int],
    *,
    context: bytes = b"",
    tools: bytes = b"",
    raw: raw_prompts.Prompt | None = None,
  ) -> Plan:
    """Numbers a request and counts it as running."""
    number = self._requests
    self._requests += 1
    if reason is not None:
      self.fork_reasons[reason] += 1
    plan = Plan(
      number=number,
      request_id=f"{self.id}/{number}",
      seed=request_seed(self.seed, number),
      parent=parent,
      fork_reason=reason,
      added_ids=added,
      prompt_ids=prompt,
      context=context,
      tools=tools,
      started=self._clock(),
      raw=raw,
    )
    self._running[number] = plan
    self._idle.clear()
    return plan

  def _find(
    self, messages: types.Messages, chain: Sequence[bytes], tools: bytes
  ) -> tuple[Node | None, int, str | None]:
    """The node to extend, the messages it covers, and why it is not deeper."""
    node, depth, reason = None, 0, None
    for k in range(len(messages), 0, -1):
      by_tools = self._conversations.get(chain[k])
      if by_tools is None:
        continue
      if tools in by_tools:
        node, depth = by_tools[tools], k
        break
      reason = TOOLS_CHANGED
    if reason is None:
      reason = self._mismatch(messages, chain, depth)
    return node, depth, reason

  def _mismatch(
    self, messages: types.Messages, chain: Sequence[bytes], depth: int
  ) -> str | None:
    """Whether messages beyond `depth` replay something recorded."""
    for k in range(depth, len(messages)):
      if messages[k]["role"] != "assistant":
        continue
      if chain[k] in self._contexts:
        return REPLY_CHANGED
      if message_digest(messages[k]) in self._replies:
        return HISTORY_CHANGED
    return None

  def _name(self, node: Node) -> str:
    return f"{self.id}/{node.number}"

  def _clock(self) -> float:
    return time.monotonic() - self._opened


def request_seed(session_seed: int, number: int) -> int:
  """The seed of a session's n-th request, in [0, 2**31)."""
  sequence = np.random.SeedSequence([session_seed, number])
  return int(sequence.generate_state(1)[0]) & 0x7FFFFFFF


def message_digest(message: types.Message) -> bytes:
  """A digest of what a message says; call ids and key order do not count."""
  calls = [
    (c["function"]["name"], _canonical(c["function"]["arguments"]))
    for c in message.get("tool_calls") or ()
  ]
  return _digest([message["role"], message.get("content") or "", calls])


def _chain(messages: types.Messages) -> list[bytes]:
  """chain[k] is the digest of the first k messages."""
  chain = [b""]
  for message in messages:
    chain.append(_link(chain[-1], message_digest(message)))
  return chain


def _link(context: bytes, message: bytes) -> bytes:
  return hashlib.blake2b(context + message, digest_size=16).digest()


def _canonical(arguments: str) -> str:
  try:
    return json.dumps(json.loads(arguments), sort_keys=True)
  except ValueError:
    return arguments


def _digest(value: Any) -> bytes:
  text = json.dumps(value, sort_keys=True, ensure_ascii=True)
  return hashlib.blake2b(text.encode(), digest_size=16).digest()
