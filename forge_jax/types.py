"""The carriers that cross a boundary between packages.

Every carrier is a frozen dataclass of plain Python and NumPy, so that the
packages that run without JAX (agents, gateway, tasks, pool) can share them.
Each says who writes it and what an absent value means.

Axis legend, used as name suffixes (`tokens_BT` has axes B and T):

  B  packs of one device batch, sharded over the mesh's data axes
  T  tokens of a pack, in depth-first order of its prefix forest
  E  edges: the distinct loss-bearing tokens of a pack
  M  rows: one per (completion, response token)
  P  prompt tokens of a completion     R  response tokens of a completion
  L  layers        D  model width      F  hidden width of the MLP
  H  query heads   K  key/value heads  C  channels of a head
  V  vocabulary    S  cache slots of the engine     W  positions of a slot
  N  block pairs of an attention plan  G  episodes of a group
"""

from collections.abc import Mapping, Sequence
import dataclasses
import enum
from typing import Any

import numpy as np


class StopReason(enum.StrEnum):
  """Why the engine stopped sampling a completion."""

  STOP = "stop"  # a stop token or a stop string was sampled
  LENGTH = "length"  # the token budget or the context is used up
  ABORT = "abort"  # the client went away or the episode was cancelled


class EpisodeStatus(enum.StrEnum):
  """How an episode ended."""

  COMPLETED = "completed"  # the agent returned
  FAILED = "failed"  # the agent or its environment raised; see `error`
  TIMED_OUT = "timed_out"  # its deadline passed; what it had is kept


class Component(enum.StrEnum):
  """The reward component of r_t = alpha*process + beta*speed + perf."""

  PERF = "perf"  # the task's verifier
  PROCESS = "process"  # dense, about one completion's behaviour


class RequestKind(enum.StrEnum):
  """What an agent wants a completion for, as far as can be told."""

  MAIN = "main"  # the task
  SUB_AGENT = "sub-agent"  # a part of it, in a conversation of its own
  TITLE = "title"  # a name for the conversation
  COMPACTION = "compaction"  # a summary that will replace the conversation


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
  """One thing to do. Written by tasks/, read by rollout/ and agents/."""

  id: str  # unique within a run: "<domain>/<split>/<index>"
  domain: str
  index: int  # position in the domain's endless, seeded sequence
  payload: Mapping[str, Any]  # JSON values; their meaning is the domain's
  # Written by the mixture, where a curriculum says so:
  level: int | None = None  # difficulty; None: the domain's own
  max_tokens: int | None = None  # of a completion; None: the domain's own


@dataclasses.dataclass(frozen=True, slots=True)
class Reward:
  """One named reward. Written by a task's environment or over HTTP."""

  name: str
  component: Component
  value: float
  step: int | None = None  # completion it belongs to; None: the last one


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  """What asked for a completion. Written by the gateway."""

  protocol: str  # its route under the base URL, such as "/chat/completions"
  model: str  # the name that was asked for, whatever it was
  digest: str  # of the request's bytes: a repeated one has the same
  kind: RequestKind = RequestKind.MAIN
  client_ids: Mapping[str, str] = dataclasses.field(default_factory=dict)
  retry_of: str | None = None  # completion that did not arrive, asked for again
  arrived: float = 0.0  # seconds since the session was opened


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Completion:
  """One (state, action) pair, exactly as sampled. Written by the gateway.

  The prompt is what the model saw and the response what it sampled; neither
  was ever re-encoded from text.
  """

  id: str
  prompt_ids: np.ndarray  # int32 [P]
  response_ids: np.ndarray  # int32 [R], with the sampled stop token, if any
  logprobs: np.ndarray  # float32 [R], under the sampling distribution, nats
  versions: np.ndarray  # int32 [R], weight version that sampled each token
  stop_reason: StopReason
  parent: str | None = None  # completion this prompt extends; None: a root
  fork_reason: str | None = None  # why a continuation did not extend; or None
  started: float = 0.0  # seconds since the session was opened
  finished: float = 0.0  # seconds since the session was opened
  first_token: float | None = None  # likewise; None: not known
  malformed: bool = False  # a tool call was attempted that is none
  # Sampled from the policy's own distribution: at temperature 1, with nothing
  # filtered, biased, penalised or constrained.
  plain: bool = True
  delivered: bool = True  # False: the client did not get the whole reply
  request: Request | None = None  # None: not known


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Episode:
  """One agent's attempt at a task. Written by rollout/."""

  id: str
  task: Task
  member: int  # 0..G-1 within its group
  seed: int  # of everything sampled in the episode
  status: EpisodeStatus
  completions: tuple[Completion, ...]  # in the order they were requested
  rewards: tuple[Reward, ...]
  messages: tuple[Mapping[str, Any], ...] = ()  # transcript, for people
  seconds: float = 0.0  # wall-clock from start to end, tools included
  error: str | None = None  # what failed, when status is not COMPLETED

  @property
  def perf(self) -> float:
    """Sum of the perf rewards."""
    return sum(r.value for r in self.rewards if r.component == Component.PERF)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Group:
  """The G episodes of one task: an item of the windowed FIFO queue."""

  index: int  # submission order, from 0, never reused within a run
  task: Task
  episodes: tuple[Episode, ...]
  number: int | None = None  # the task's place in the run; None: the index
  attempt: int = 0  # earlier groups of this task that were dropped

  @property
  def version(self) -> int | None:
    """The oldest weights that sampled one of its tokens; None: no tokens."""
    versions = [
      int(completion.versions.min())
      for episode in self.episodes
      for completion in episode.completions
      if len(completion.versions)
    ]
    return min(versions, default=None)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sample:
  """A completion with its credit: the input of the prefix-tree merge.

  Written by algo-driven code in trainer/; all response arrays have length R.
  """

  name: str  # for error messages: "<episode>/<completion number>"
  prompt_ids: np.ndarray  # int32 [P]
  response_ids: np.ndarray  # int32 [R]
  logprobs: np.ndarray  # float32 [R], behaviour policy
  advantages: np.ndarray  # float32 [R]
  weights: np.ndarray  # float32 [R], factor of each token's loss term
  # int32 [R]; -1 where a log-probability is not that of one version's policy:
  # weights were swapped on the way, or the completion is not plain.
  versions: np.ndarray
  episode: str = ""  # whose requests follow one another; "": a request alone


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
  """A forest of merged sequences, laid out in depth-first order.

  Key k is visible to query q exactly when k <= q < subtree_end_T[k].

  The tokens that a sequence adds to those before it in depth-first order are
  its branch: contiguous, from depth `branch_depth` to its own length. What
  lies above hangs on another sequence's branch, `branch_parent`.
  """

  tokens_T: np.ndarray  # int32
  position_T: np.ndarray  # int32, depth of the token in its sequence
  parent_T: np.ndarray  # int32, index of the predecessor; -1 at a root
  subtree_end_T: np.ndarray  # int32, exclusive
  samples_T: np.ndarray  # int32, sequences that pass through the token
  # Per sequence, in the order given:
  length: np.ndarray  # int32, of the whole sequence
  branch_start: np.ndarray  # int32, where in T the branch starts, even if empty
  branch_depth: np.ndarray  # int32, tokens shared with sequences before it
  branch_parent: np.ndarray  # int32, a sequence; -1: the branch is at a root
  order: np.ndarray  # int32, the sequences in depth-first order

  def find(self, sequence: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Where in T tokens lie, given their sequences and depths.

    Args:
      sequence: int [N], places in the order given.
      depth: int [N], each less than its sequence's length.

    Returns:
      int32 [N].
    """
    branch = np.array(sequence)
    above = np.flatnonzero(depth < self.branch_depth[branch])
    while len(above):
      parent = self.branch_parent[branch[above]]
      branch[above] = parent
      above = above[depth[above] < self.branch_depth[parent]]
    offset = self.branch_start - self.branch_depth
    return offset[branch] + depth.astype(np.int32)

  def path(self, sequence: int) -> np.ndarray:
    """Where in T the tokens of a sequence lie, from its root; int32."""
    depth = np.arange(self.length[sequence], dtype=np.int32)
    return self.find(np.full(len(depth), sequence), depth)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TreeLayout:
  """What tree attention needs to know of B packs; built on the host.

  The block plan lists the visible (query block, key block) pairs twice, by
  query block and by key block, in compressed sparse row form; entries past
  the last row pointer are padding.
  """

  subtree_end_BT: np.ndarray  # int32; a padding token i has i + 1
  query_start: np.ndarray  # int32 [B, T/block + 1], row pointers by query
  key_block: np.ndarray  # int32 [B, N], key blocks, sorted by query block
  key_start: np.ndarray  # int32 [B, T/block + 1], row pointers by key
  query_block: np.ndarray  # int32 [B, N], query blocks, sorted by key block


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
  """The trainer's only input. Written by tree/pack.py, static shapes.

  The log-probability of edge e is read at hidden state `edge_parent_BE[e]`;
  row m trains edge `row_edge_BM[m]`. Padding rows have weight 0, version -1;
  padding edges have token -1.
  """

  tokens_BT: np.ndarray  # int32
  position_BT: np.ndarray  # int32
  parent_BT: np.ndarray  # int32, index of a token's predecessor; -1: none
  samples_BT: np.ndarray  # int32, samples that a token stands for; padding: 0
  layout: TreeLayout
  edge_parent_BE: np.ndarray  # int32, index in T
  edge_token_BE: np.ndarray  # int32, token id whose log-probability is read
  row_edge_BM: np.ndarray  # int32, index in E
  old_logprob_BM: np.ndarray  # float32, recorded behaviour log-probability
  advantage_BM: np.ndarray  # float32
  weight_BM: np.ndarray  # float32
  version_BM: np.ndarray  # int32, weight version that sampled the token


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class WeightsVersion:
  """A policy's weights: how the trainer and an engine meet.

  In one process `params` holds the arrays; between processes `path` names a
  safetensors directory. Exactly one of the two is set.
  """

  version: int  # number of trainer steps taken
  params: Any | None = None
  path: str | None = None


Message = Mapping[str, Any]  # a chat message in the OpenAI wire format
Messages = Sequence[Message]
