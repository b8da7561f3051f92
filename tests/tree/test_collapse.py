"""Each way in which histories come not to merge is named; healthy ones pass."""

import dataclasses

import numpy as np
import pytest
from toy import sample

from forge_jax.tree import collapse, merge

Reason = collapse.Reason
TURNS, PROMPT, RESPONSE, OBSERVATION = 10, 300, 40, 60


def episode(rng, name, prompt, render):
  """An episode of whole turns; `render` makes a turn's prompt from them.

  Args:
    rng: source of all tokens.
    name: the episode's.
    prompt: what it begins with.
    render: maps (prompt, [(response, observation), ...]) to prompt ids.
  """
  turns, samples = [], []
  for number in range(TURNS):
    response = rng.integers(0, 1000, RESPONSE)
    made = sample(f"{name}/{number}", render(prompt, turns), response, rng=rng)
    samples.append(dataclasses.replace(made, episode=name))
    turns.append((response, rng.integers(0, 1000, OBSERVATION)))
  return samples


def group(render, *, members=3, seed=0):
  rng = np.random.default_rng(seed)
  prompt = rng.integers(0, 1000, PROMPT)
  return [
    one
    for member in range(members)
    for one in episode(rng, f"e{member}", prompt, render)
  ]


def flat(prompt, turns):
  return np.concatenate([prompt, *(x for turn in turns for x in turn)])


def inputs(one):
  return np.concatenate([one.prompt_ids, one.response_ids[:-1]])


def ratio(samples):
  sequences = [inputs(one) for one in samples]
  unique = len(merge.merge(sequences).tokens_T)
  return sum(map(len, sequences)) / unique


def examine(samples, **options):
  return collapse.examine([samples], ratio(samples), **options)


def billed(prompt, turns):
  """A header that changes with every request, behind five fixed tokens."""
  header = np.random.default_rng(len(turns)).integers(0, 1000, 12)
  return np.concatenate([prompt[:5], header, flat(prompt[5:], turns)])


def stripped(prompt, turns):
  """The first half of every response, its reasoning, is left out."""
  return flat(prompt, [(r[RESPONSE // 2 :], o) for r, o in turns])


def forgetful(prompt, turns):
  """Observations older than three turns become a mark."""
  mark = np.full(3, 7)
  old = [(r, mark) for r, _ in turns[:-3]]
  return flat(prompt, old + turns[-3:])


def summarised(prompt, turns):
  """After four turns, a fresh summary of all but the newest each time."""
  if len(turns) < 4:
    return flat(prompt, turns)
  summary = np.random.default_rng(len(turns)).integers(0, 1000, 150)
  size = 150 - 10 * (len(turns) - 4)
  return np.concatenate([prompt, turns[0][0], summary[:size]])


def encoded_again(prompt, turns):
  """The middle of every response splits into other tokens."""
  return flat(prompt, [([*r[:15], 1001, 1002, *r[17:]], o) for r, o in turns])


def test_extending_episodes_reach_what_is_possible():
  samples = group(flat)
  found = examine(samples, limit=0.99)
  assert not found.collapsed and found.cause is None
  # The rollouts share their prompt; each then adds its own tokens once.
  last = PROMPT + TURNS * RESPONSE + (TURNS - 1) * OBSERVATION - 1
  unique = PROMPT + 3 * (last - PROMPT)
  requested = sum(len(inputs(one)) for one in samples)
  assert found.possible_ratio == pytest.approx(requested / unique)
  assert found.merge_ratio == pytest.approx(found.possible_ratio)
  assert str(found) == "merge ratio 7.6 of 7.6 possible"


def test_a_header_at_the_top_is_a_collapse():
  found = examine(group(billed))
  assert found.collapsed
  assert found.merge_ratio < 2.9 and found.possible_ratio > 5
  assert found.cause == collapse.Cause(Reason.PROMPT, 1.0, 6, 0)
  assert str(found).endswith(
    "possible: 100% of requests differ from their predecessor within the first "
    "6 tokens"
  )


def test_a_header_on_some_requests_says_on_how_many():
  def sometimes(prompt, turns):
    return (flat if len(turns) in (0, 1, 2) else billed)(prompt, turns)

  found = examine(group(sometimes, members=1))
  assert found.cause.reason == Reason.PROMPT
  assert found.cause.share == pytest.approx(7 / 9)
  assert "78% of requests" in str(found)


def test_old_observations_that_change_are_history():
  found = examine(group(forgetful, members=1), limit=0.8)
  # From the fifth request on, the oldest turn that was kept loses its place.
  assert found.cause.reason == Reason.HISTORY
  assert found.cause.share == pytest.approx(6 / 9)


def test_the_turn_that_changes_is_named():
  """As a clock does that is read again for every request."""

  def clock(prompt, turns):
    time = np.full(5, 2000 + len(turns))
    turns = [
      (r, [*time, *o] if i == 1 else o) for i, (r, o) in enumerate(turns)
    ]
    return flat(prompt, turns)

  found = examine(group(clock))
  assert found.cause.reason == Reason.HISTORY and found.cause.turn == 2
  assert "share the prompt but rewrite their history after turn 2" in str(found)


def test_summaries_that_replace_the_history_are_named():
  found = examine(group(summarised))
  assert found.collapsed
  assert found.cause.reason == Reason.COMPACTED
  assert found.cause.turn == 1
  assert "replace their history after turn 1 by something shorter" in str(found)


def test_left_out_reasoning_loses_less_than_half():
  """What a response adds is new in any case; only observations come twice."""
  samples = group(stripped)
  assert not examine(samples).collapsed
  found = examine(samples, limit=0.95)
  assert found.cause.reason == Reason.LEFT_OUT
  assert found.cause.share == 1.0
  assert "leave out a part of their predecessor's response" in str(found)


@pytest.mark.parametrize("opening", [0, 3])
def test_a_template_may_open_a_response_with_tokens_of_its_own(opening):
  """As <think> does, which later prompts do not repeat."""

  def opened(prompt, turns):
    tokens = np.full(opening, 1005)
    return np.concatenate([stripped(prompt, turns), tokens])

  found = examine(group(opened), limit=0.95)
  assert found.cause.reason == Reason.LEFT_OUT


def test_responses_encoded_again_are_named():
  found = examine(group(encoded_again), limit=0.99)
  assert found.cause.reason == Reason.RESPONSE
  assert found.cause.share == 1.0
  assert "inside their predecessor's response" in str(found)


def test_compaction_now_and_then_is_healthy():
  def compacted(prompt, turns):
    done = len(turns) // 5 * 5
    summary = np.random.default_rng(done).integers(0, 1000, 20 if done else 0)
    return np.concatenate([prompt, summary, flat([], turns[done:])])

  assert not examine(group(compacted), limit=0.7).collapsed


def test_two_agents_taking_turns_are_healthy():
  """A request need not extend the one before it to share all it could."""
  rng = np.random.default_rng(0)
  a, b = (
    episode(rng, "e", rng.integers(0, 1000, PROMPT), flat) for _ in range(2)
  )
  both = [one for pair in zip(a, b, strict=True) for one in pair]
  assert not examine(both).collapsed


def test_single_requests_cannot_collapse():
  rng = np.random.default_rng(0)
  samples = [
    sample(f"s{i}", rng.integers(0, 9, 30), [1, 2], rng=rng) for i in range(9)
  ]
  found = collapse.examine([samples[:5], samples[5:]], 1.0)
  assert found == collapse.Sharing(1.0, 1.0, None)
  assert collapse.examine([[]], 0.0) == collapse.Sharing(0.0, 0.0, None)


def test_updates_are_not_expected_to_share():
  samples = group(flat, members=4)
  half = len(samples) // 2
  apart = collapse.examine([samples[:half], samples[half:]], 1.0, limit=0)
  whole = collapse.examine([samples], 1.0, limit=0)
  assert apart.possible_ratio < whole.possible_ratio
