"""The prefix cache: a radix tree of pages over the tokens of every session.

A node is one page: the keys and values of up to `page` tokens that follow
those of its parents. A lease is one live sequence's path through the tree. This
is plain bookkeeping; the arrays are the runner's, which carries out the moves.

Invariants:
  - A page belongs to one node or is free; page 0 belongs to nobody, so that
    padding may read it. The same holds of host pages.
  - Only committed tokens match. A node with children is full, and an unfinished
    node that is pinned has one writer.
  - The nodes of a lease are pinned, and pinned nodes are on the device. Where a
    node is on the device, so are its parents.
  - When a page is needed, the least recently used node without a child on the
    device gives up its own, to the host if there is room, so that a subtree
    goes from its leaves up. A parent is used whenever a child is.
  - After `forget`, nothing committed before it matches. Nodes of leases stay
    with these, and are freed as soon as no lease has them.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import heapq
import itertools

_STRIDE = 64  # tokens compared at once


class Node:
  """A page of the tree."""

  __slots__ = (
    "below",
    "children",
    "epoch",
    "host",
    "page",
    "parent",
    "pins",
    "tokens",
    "used",
  )

  def __init__(self, parent: "Node | None", page: int | None, epoch: int):
    self.parent = parent
    self.page = page  # on the device
    self.host: int | None = None  # on the host
    self.epoch = epoch  # how often the cache had forgotten
    self.tokens: list[int] = []
    self.children: dict[int, list[Node]] = {}  # by their first token
    self.below = 0  # children on the device
    self.pins = 0  # leases that hold it
    self.used = 0  # clock of the last use


class Lease:
  """The pages of one sequence; the first `length` tokens are committed."""

  def __init__(self, epoch: int):
    self.nodes: list[Node] = []
    self.length = 0
    self.epoch = epoch

  @property
  def pages(self) -> list[int]:
    """Pages on the device, in the order of the tokens."""
    return [node.page for node in self.nodes]


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
  """A page to be copied before the next step, in order of appearance."""

  kind: str  # "copy": device to device; "save": to the host; "load": from it
  source: int
  target: int


class PrefixCache:
  """Which tokens' keys and values are in which page."""

  def __init__(
    self, pages: int, page: int, host_pages: int = 0, *, reuse: bool = True
  ):
    """An empty cache.

    Args:
      pages: pages on the device, the unused page 0 included.
      page: tokens of a page.
      host_pages: pages on the host, which hold what the device had no room for.
      reuse: whether sequences share anything at all.
    """
    self.page = page
    self._free = list(range(pages - 1, 0, -1))
    self._free_host = list(range(host_pages - 1, -1, -1))
    self._reuse = reuse
    self._epoch = 0
    self._root = Node(None, None, 0)
    self._moves: list[Move] = []
    self._clock = itertools.count(1)
    # Nodes that may be evicted from the device, or dropped from the host, by
    # last use; some no longer may, which shows when they come up.
    self._idle: list[tuple[int, int, Node]] = []
    self._idle_host: list[tuple[int, int, Node]] = []
    self.evicted = 0  # pages so far, from the device
    self.loaded = 0  # pages so far, from the host

  def shared(self, tokens: Sequence[int]) -> int:
    """How many first tokens `acquire` would reuse: all but the last at most."""
    nodes, _, count = self._match(tokens)
    return len(nodes) * self.page + count

  def acquire(self, tokens: Sequence[int]) -> Lease:
    """A lease on the longest prefix there is, as far as pages suffice.

    The last token is never reused: its hidden state is needed.
    """
    nodes, partial, count = self._match(tokens)
    held = nodes + ([partial] if partial else [])
    owned = bool(
      partial
      and not partial.pins
      and not partial.children
      and count == len(partial.tokens)
      and partial.page is not None
    )
    for node in held:
      self._pin(node)
    lease = Lease(self._epoch)
    for node in nodes:
      if node.page is None and not self._load(node):
        break
      lease.nodes.append(node)
      lease.length += self.page
    whole = len(lease.nodes) == len(nodes)
    if whole and owned:
      lease.nodes.append(partial)
      lease.length += count
    elif whole and partial and (page := self._page()) is not None:
      kind, source = (
        ("load", partial.host)
        if partial.page is None
        else ("copy", partial.page)
      )
      self._moves.append(Move(kind, source, page))
      lease.nodes.append(self._new(lease, page))
      self.commit(lease, tokens[lease.length : lease.length + count])
    for node in held:
      if node not in lease.nodes:
        self._unpin(node)
    return lease

  def reserve(self, lease: Lease, length: int) -> bool:
    """Provides pages for the first `length` tokens; False: there are none."""
    while len(lease.nodes) * self.page < length:
      page = self._page()
      if page is None:
        return False
      lease.nodes.append(self._new(lease, page))
    return True

  def commit(self, lease: Lease, tokens: Sequence[int]) -> None:
    """Appends tokens whose keys and values are in the lease's pages."""
    tokens = list(tokens)
    while tokens:
      at = lease.length // self.page
      node = lease.nodes[at]
      some = tokens[: self.page - len(node.tokens)]
      if not node.tokens:
        self._link(node, some[0])
      node.tokens += some
      del tokens[: len(some)]
      lease.length += len(some)
      if len(node.tokens) == self.page:
        self._unite(lease, at)

  def release(self, lease: Lease) -> None:
    """Ends a lease; what it committed stays for others."""
    while lease.nodes:
      node = lease.nodes.pop()
      self._unpin(node)
    lease.length = 0

  def forget(self) -> None:
    """Makes sure that nothing committed so far is reused."""
    self._epoch += 1
    for node in list(self._below(self._root)):
      if not node.pins:
        self._release_pages(node)
    self._root = Node(None, None, self._epoch)
    self._idle.clear()
    self._idle_host.clear()

  def take_moves(self) -> list[Move]:
    """The moves since the last call: to be done, in order, before a step."""
    moves, self._moves = self._moves, []
    return moves

  def _match(
    self, tokens: Sequence[int]
  ) -> tuple[list[Node], Node | None, int]:
    """Whole nodes, the node that goes on to match, and of how many tokens."""
    node, at, nodes = self._root, 0, []
    limit = len(tokens) - 1 if self._reuse else 0
    while at < limit:
      wanted = list(tokens[at : min(at + self.page, limit)])
      best, count = None, 0
      for child in node.children.get(wanted[0], ()):
        common = common_prefix(child.tokens, wanted)
        if common > count:
          best, count = child, common
      if count < self.page:
        return nodes, best, count
      nodes.append(best)
      node, at = best, at + self.page
    return nodes, None, 0

  def _new(self, lease: Lease, page: int) -> Node:
    """An empty node at the end of a lease; its first token links it."""
    parent = lease.nodes[-1] if lease.nodes else self._root
    node = Node(parent, page, lease.epoch)
    self._pin(node)
    return node

  def _link(self, node: Node, first: int) -> None:
    if node.epoch == self._epoch:
      node.parent.children.setdefault(first, []).append(node)
      node.parent.below += 1

  def _unlink(self, node: Node) -> None:
    siblings = node.parent.children[node.tokens[0]]
    siblings.remove(node)
    if not siblings:
      del node.parent.children[node.tokens[0]]
    node.parent.below -= node.page is not None

  def _unite(self, lease: Lease, at: int) -> None:
    """Gives up a node that has just become the same as a sibling."""
    node = lease.nodes[at]
    if node.epoch != self._epoch or not self._reuse:
      return
    for other in node.parent.children[node.tokens[0]]:
      same = other is not node and other.tokens == node.tokens
      if same and other.page is not None:
        self._unlink(node)
        self._release_pages(node)
        self._pin(other)
        lease.nodes[at] = other
        for later in lease.nodes[at + 1 : at + 2]:
          later.parent = other
        return

  def _pin(self, node: Node) -> None:
    node.pins += 1
    node.used = next(self._clock)

  def _unpin(self, node: Node) -> None:
    node.pins -= 1
    node.used = next(self._clock)
    if node.pins:
      return
    if node.epoch != self._epoch or not node.tokens:
      self._release_pages(node)
    else:
      self._note_idle(node)

  def _note_idle(self, node: Node) -> None:
    """Queues a node for eviction, where it may be evicted."""
    if node is self._root or node.pins:
      return
    entry = (node.used, id(node), node)
    if node.page is not None and not node.below:
      heapq.heappush(self._idle, entry)
    elif node.page is None and node.host is not None and not node.children:
      heapq.heappush(self._idle_host, entry)

  def _page(self) -> int | None:
    """A free page of the device, made free if need be; None: all are held."""
    if not self._free:
      self._evict()
    return self._free.pop() if self._free else None

  def _evict(self) -> None:
    while self._idle:
      used, _, node = heapq.heappop(self._idle)
      if node.page is None or node.pins or node.below or node.used != used:
        continue
      self.evicted += 1
      slot = self._host_page()
      if slot is None:
        self._drop(node)
      else:
        self._moves.append(Move("save", node.page, slot))
        self._free.append(node.page)
        node.page, node.host = None, slot
        node.parent.below -= 1
        self._note_idle(node)
      self._note_idle(node.parent)
      return

  def _host_page(self) -> int | None:
    while not self._free_host and self._idle_host:
      used, _, node = heapq.heappop(self._idle_host)
      held = node.host is not None and node.page is None and not node.children
      if held and not node.pins and node.used == used:
        self._drop(node)
        self._note_idle(node.parent)
    return self._free_host.pop() if self._free_host else None

  def _drop(self, node: Node) -> None:
    """Takes an unpinned node, and what follows it, out of the tree."""
    self._unlink(node)
    for one in [node, *self._below(node)]:
      self._release_pages(one)

  def _load(self, node: Node) -> bool:
    page = self._page()
    if page is None:
      return False
    self._moves.append(Move("load", node.host, page))
    self._free_host.append(node.host)
    node.page, node.host = page, None
    node.parent.below += 1
    self.loaded += 1
    return True

  def _release_pages(self, node: Node) -> None:
    if node.page is not None:
      self._free.append(node.page)
    if node.host is not None:
      self._free_host.append(node.host)
    node.page = node.host = None

  def _below(self, node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
      children = [c for some in stack.pop().children.values() for c in some]
      stack += children
      yield from children


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
  """Length of the longest common prefix of two lists."""
  size = min(len(a), len(b))
  for start in range(0, size, _STRIDE):
    end = min(start + _STRIDE, size)
    if a[start:end] != b[start:end]:
      return next(n for n in range(start, end) if a[n] != b[n])
  return size
