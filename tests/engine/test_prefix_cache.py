"""The radix tree against a naive cache, and against its invariants.

A device is simulated: arrays of pages that hold the tokens themselves, on which
moves and commits act as the runner's do, so that a wrong page shows.
"""

import hypothesis
from hypothesis import strategies as st
import naive_cache
import numpy as np
import pytest

from forge_jax.engine import prefix_cache

PAGE = 4


class Simulation:
  """A cache with its device and host memory, and live sequences."""

  def __init__(self, pages=1000, host_pages=0, **options):
    self.cache = prefix_cache.PrefixCache(pages, PAGE, host_pages, **options)
    self.device = np.full((pages, PAGE), -1)
    self.host = np.full((host_pages, PAGE), -1)
    self.live = []  # (lease, tokens)

  def start(self, tokens):
    """Runs a prompt; returns its lease, or None without pages."""
    expected = self.cache.shared(tokens)
    lease = self.cache.acquire(tokens)
    self.reused = lease.length
    assert lease.length <= expected
    self.move()
    self.check(lease, tokens[: lease.length])
    if not self.cache.reserve(lease, len(tokens)):
      self.cache.release(lease)
      return None
    self.write(lease, tokens[lease.length :])
    self.live.append((lease, list(tokens)))
    return lease

  def extend(self, index, token):
    lease, tokens = self.live[index]
    if self.cache.reserve(lease, lease.length + 1):
      self.write(lease, [token])
      tokens.append(token)

  def end(self, index):
    lease, tokens = self.live.pop(index)
    self.check(lease, tokens)
    self.cache.release(lease)

  def write(self, lease, tokens):
    self.move()
    for n, token in enumerate(tokens, lease.length):
      self.device[lease.pages[n // PAGE], n % PAGE] = token
    self.cache.commit(lease, tokens)

  def move(self):
    memory = {
      "copy": (self.device, self.device),
      "save": (self.device, self.host),
      "load": (self.host, self.device),
    }
    for move in self.cache.take_moves():
      source, target = memory[move.kind]
      target[move.target] = source[move.source]

  def check(self, lease, tokens):
    """The lease's pages hold the tokens."""
    held = self.device[lease.pages].ravel()[: lease.length]
    assert held.tolist() == list(tokens)[: lease.length]
    assert 0 not in lease.pages

  def check_pages(self):
    """No page is lost or held twice."""
    cache = self.cache
    nodes = {id(n): n for n in cache._below(cache._root)}
    nodes |= {id(n): n for lease, _ in self.live for n in lease.nodes}
    pages = [n.page for n in nodes.values() if n.page is not None]
    assert sorted(pages + cache._free) == list(range(1, len(self.device)))
    hosts = [n.host for n in nodes.values() if n.host is not None]
    assert sorted(hosts + cache._free_host) == list(range(len(self.host)))
    for node in cache._below(cache._root):
      children = [c for some in node.children.values() for c in some]
      assert node.below == sum(c.page is not None for c in children)
      assert not children or len(node.tokens) == PAGE
      if node.page is not None and node.parent is not cache._root:
        assert node.parent.page is not None
    for lease, tokens in self.live:
      self.check(lease, tokens)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
ACTIONS = st.lists(
  st.one_of(
    st.tuples(st.just("start"), PROMPTS),
    st.tuples(st.just("extend"), st.tuples(st.integers(0), st.integers(0, 1))),
    st.tuples(st.just("end"), st.integers(0)),
    st.tuples(st.just("forget"), st.none()),
  ),
  max_size=40,
)


def act(simulation, kind, value):
  if kind == "start":
    simulation.start(value)
  elif kind == "forget":
    simulation.cache.forget()
  elif simulation.live:
    index = value if kind == "end" else value[0]
    index %= len(simulation.live)
    if kind == "end":
      simulation.end(index)
    else:
      simulation.extend(index, value[1])


@hypothesis.given(ACTIONS)
@hypothesis.settings(max_examples=150)
def test_it_finds_what_a_naive_cache_finds(actions):
  simulation, naive, stale = Simulation(), naive_cache.NaiveCache(), []
  for kind, value in actions:
    if kind == "start":
      expected = naive.shared(value)
      assert simulation.cache.shared(value) == expected
    act(simulation, kind, value)
    if kind == "start":
      assert simulation.reused == expected
    if kind == "forget":
      naive.forget()
      stale = [lease for lease, _ in simulation.live]
    for lease, tokens in simulation.live:
      if lease not in stale:  # those before a forget match no more
        naive.commit(tokens)
    simulation.check_pages()


@hypothesis.given(ACTIONS, st.integers(5, 9), st.integers(0, 5))
@hypothesis.settings(max_examples=300)
def test_few_pages_lose_and_mix_up_nothing(actions, pages, host_pages):
  simulation = Simulation(pages, host_pages)
  for kind, value in actions:
    act(simulation, kind, value)
    simulation.check_pages()
  while simulation.live:
    simulation.end(0)
  # Whatever was held can be had again.
  lease = simulation.cache.acquire([9])
  assert simulation.cache.reserve(lease, (pages - 1) * PAGE)
  assert not simulation.cache.reserve(lease, pages * PAGE)


def test_the_last_token_is_never_reused():
  simulation = Simulation()
  simulation.start(range(8))
  assert simulation.cache.shared(range(8)) == 7
  assert simulation.cache.shared(range(9)) == 8


def test_a_conversation_goes_on_in_its_own_page():
  simulation = Simulation()
  pages = simulation.start(range(6)).pages
  simulation.end(0)
  again = simulation.start(range(9))
  assert again.pages[:2] == pages and simulation.reused == 6


def test_a_group_shares_pages_and_copies_the_one_it_diverges_in():
  simulation = Simulation()
  first = simulation.start(range(10))
  second = simulation.start(range(10))
  assert simulation.reused == 9
  assert second.pages[:2] == first.pages[:2]
  assert second.pages[2] != first.pages[2]


def test_sequences_that_come_to_be_the_same_share_their_pages():
  simulation = Simulation()
  first, second = simulation.start([1, 2]), simulation.start([3])
  assert first.pages != second.pages
  third = simulation.start([1])
  for token in (2, 5, 6):
    simulation.extend(2, token)
  for token in (5, 6):
    simulation.extend(0, token)
  assert first.pages == third.pages
  simulation.check_pages()


def test_least_recently_used_subtrees_go_first_from_their_leaves():
  simulation = Simulation(pages=6)
  old = [1] * 9
  simulation.start(old)  # three pages
  simulation.end(0)
  new = [2] * 5
  simulation.start(new)  # two
  simulation.end(0)
  simulation.start([3])
  assert simulation.cache.shared(old) == 8  # only the leaf, of one token, went
  assert simulation.cache.shared([*new, 0]) == 5
  simulation.start([4] * 5)  # two more
  assert simulation.cache.shared(old) == 0
  assert simulation.cache.shared([*new, 0]) == 5


def test_pinned_pages_stay():
  simulation = Simulation(pages=4)
  simulation.start([1] * 9)
  assert simulation.start([2]) is None
  simulation.end(0)
  assert simulation.start([2]) is not None


def test_the_host_holds_what_the_device_cannot():
  simulation = Simulation(pages=4, host_pages=4)
  first, second = [1] * 12, [2] * 12
  for tokens in (first, second, first, second):
    simulation.start(tokens)
    simulation.end(0)
  assert simulation.reused == 11 and simulation.cache.loaded == 4
  simulation.check_pages()


@pytest.mark.parametrize("option", [{}, {"reuse": False}])
def test_reuse_can_be_off(option):
  simulation = Simulation(**option)
  simulation.start(range(10))
  simulation.start(range(10))
  assert simulation.reused == (9 if not option else 0)
  simulation.check_pages()
