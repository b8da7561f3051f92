"""How many tokens are drafted, on made-up costs and acceptances."""

import itertools

import numpy as np
import pytest

from forge_jax.engine import speculation

PLAIN, DRAFT = 10.0, 3.0  # milliseconds of a step, and of each draft


class World:
  """Steps with a given acceptance, whose clock is made up, too."""

  def __init__(self, acceptance, most=3, buckets=(1, 8, 64), seed=0):
    self.acceptance = acceptance
    self.cost = lambda rows, length: PLAIN + DRAFT * length
    self.made = speculation.Speculation(buckets, most)
    self._random = np.random.default_rng(seed)

  def step(self, rows=1, steps=1, left=100):
    """Returns the drafts, the tokens and the time."""
    length = min(self.made.length(rows, steps), left - 1)
    right = self._random.random((steps, rows, length)) < self.acceptance
    taken = 1 + np.cumprod(right, axis=-1).sum(-1)
    seconds = steps * self.cost(rows, length)
    measured = seconds * self._random.normal(1, 0.03)
    if self._random.random() < 0.02:
      measured *= 8  # somebody else had the processor
    self.made.record([length] * rows, taken.tolist(), measured)
    return length, taken.sum() / rows, seconds

  def run(self, count, rows=1, steps=1):
    """The share of each length, and the speed-up over plain steps."""
    figures = np.array([self.step(rows, steps) for _ in range(count)])
    lengths = np.bincount(figures[:, 0].astype(int), minlength=4) / count
    tokens, seconds = figures[:, 1:].sum(0)
    return lengths, tokens * self.cost(rows, 0) / seconds


@pytest.mark.parametrize(
  # Worth of the lengths over a plain step, at costs of 1, 1.3, 1.6 and 1.9.
  ("acceptance", "best"),
  [
    (0.95, 3),  # 1.50, 1.78, 1.95
    (0.55, 1),  # 1.19, 1.16, 1.07
    (0.2, 0),  # 0.92, 0.78, 0.66
    (0.0, 0),
  ],
)
def test_the_length_that_is_worth_most_is_taken(acceptance, best):
  world = World(acceptance)
  world.run(300)
  lengths, speedup = world.run(2000)
  if acceptance == 0.55:  # the two best are about as good
    assert lengths[1] + lengths[2] > 0.8 and speedup > 1.1
  else:
    assert lengths[best] > 0.9
    assert speedup > 1.85 if best else speedup > 0.98


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("dear", [0.3, 1.0, 3.0])  # a draft, in plain steps
def test_drafting_that_never_pays_costs_three_percent_at_most(steps, dear):
  world = World(0.0)
  world.cost = lambda rows, length: PLAIN * (1 + dear * length)
  world.run(400 // steps, steps=steps)
  assert world.run(5000 // steps, steps=steps)[1] > 0.97


def test_the_first_tries_cost_a_few_plain_steps():
  world = World(0.0)
  figures = np.array([world.step() for _ in range(100)])
  tokens, seconds = figures[:, 1:].sum(0)
  assert set(figures[:, 0]) > {0, 1}
  assert seconds - tokens * PLAIN < 9 * PLAIN


def test_plain_steps_are_timed_first_and_between_tries():
  world = World(0.0)
  lengths = [world.step()[0] for _ in range(40)]
  assert lengths[:7] == [0] * 7 and max(lengths) > 0
  assert all(0 in pair for pair in itertools.pairwise(lengths))


def test_one_hiccup_at_the_first_try_does_not_end_trying():
  world = World(0.95)
  while not world.step()[0]:
    pass
  made = world.made
  made._costs[0][0]._seconds[1][0] *= 100
  world.run(300)
  assert world.run(300)[0][3] > 0.9


def test_what_plain_steps_cost_is_measured_while_drafting_pays():
  world = World(0.95)
  world.run(1000)
  # What the host adds is now most of a step: drafts save more still.
  world.cost = lambda rows, length: 5 * PLAIN + DRAFT * length
  world.run(3000)
  before = dict(world.made.stats())
  world.run(1000)
  grown = {k: x - before[k] for k, x in world.made.stats().items()}
  estimate = grown["plain_decode_seconds"] / grown["decode_seconds"]
  assert 2.7 < estimate < 3.7


def test_steps_that_go_alone_have_their_own_costs():
  world = World(0.8)
  # Where several go at once the host is no hindrance, and drafts do not pay.
  host = {1: 10 * PLAIN, 4: 0.0}
  for _ in range(400):
    for steps in host:
      world.cost = lambda rows, length, steps=steps: (
        host[steps] + PLAIN * (1 + length)
      )
      world.step(steps=steps)
  assert world.made.length(1, 1) > 0 and world.made.length(1, 4) == 0


def test_new_acceptance_is_noticed_both_ways():
  world = World(0.0)
  world.run(1000)
  world.acceptance = 0.9
  world.run(3000)
  assert world.run(500)[0][3] > 0.85
  world.acceptance = 0.0
  world.run(100)
  assert world.run(500)[0][0] > 0.9


def test_a_length_that_has_come_to_cost_less_is_noticed():
  world = World(0.9)
  world.cost = lambda rows, length: PLAIN * (1 + 5 * length)
  world.run(1000)
  world.cost = lambda rows, length: PLAIN
  world.run(6000)
  assert world.run(300)[0][0] < 0.05


def test_each_number_of_sequences_has_its_own_costs():
  world = World(0.8)
  world.cost = lambda rows, length: PLAIN * (1 + length * (rows > 8))
  for rows in (1, 64) * 300:
    world.step(rows)
  assert world.made.length(1) == 3 and world.made.length(40) == 0


def test_figures_are_totals():
  made = speculation.Speculation((4,), 2)
  made.record([0, 0], [[1, 1]] * 2, 2.0)
  made.record([2, 1], [[3, 1], [2, 2]], 3.0)
  made.record([0, 0], [[1, 1]], 2.0)
  assert made.stats() == {
    "decoded_rows": 10,
    "verified_rows": 4,
    "drafted_tokens": 6,
    "accepted_tokens": 4,
    "decode_seconds": 7.0,
    # Four tokens a sequence, at a second each.
    "plain_decode_seconds": 2.0 + 4.0 + 2.0,
  }


def test_short_rows_do_not_keep_a_length_on_trial():
  world = World(0.0)
  asked = [world.made.length(1) for _ in range(400) if world.step(left=2)]
  assert asked[100:].count(0) > 0.97 * len(asked[100:])


def test_without_adapting_the_most_is_drafted():
  made = speculation.Speculation((1, 4), 3, adaptive=False)
  made.record([3], [[1]], 100.0)
  assert [made.length(rows) for rows in (0, 1, 4)] == [0, 3, 3]


def test_nothing_that_drafts_is_never_asked_to():
  made = speculation.Speculation((4,), 0)
  made.record([0], [[1]], 1.0)
  assert made.length(3) == 0 and made.stats() == {}
