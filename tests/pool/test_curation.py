"""Each hook: what it drops or changes, what it counts, what comes instead."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest

from forge_jax import errors, types
from forge_jax.observe import names
from forge_jax.pool import chain, curation, edits, replay, store
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import window as window_lib

STOP, LENGTH = types.StopReason.STOP, types.StopReason.LENGTH


def completion(tokens, version=0, stop=STOP):
  size = len(tokens)
  return types.Completion(
    id="0",
    prompt_ids=np.array([7], np.int32),
    response_ids=np.array(tokens, np.int32),
    logprobs=np.zeros(size, np.float32),
    versions=np.full(size, version, np.int32),
    stop_reason=stop,
  )


def group(index, *, scores=(1.0, 0.0), domain="sums", **fields):
  """A group with an episode a score; `fields` of its completions."""
  task = types.Task(f"{domain}/train/{index}", domain, index, {})
  fields = {"tokens": [index, index]} | fields
  tokens = fields.pop("tokens")
  episodes = tuple(
    types.Episode(
      id=f"group{index}-{member}",
      task=task,
      member=member,
      seed=0,
      status=types.EpisodeStatus.COMPLETED,
      completions=(completion([*tokens, member], **fields),),
      rewards=(types.Reward("answer", types.Component.PERF, score),),
    )
    for member, score in enumerate(scores)
  )
  return types.Group(index, task, episodes)


def trains(one):
  return len({episode.perf for episode in one.episodes}) > 1


@pytest.fixture
def pool(tmp_path):
  with store.DataPool.open(tmp_path / "pool") as opened:
    yield opened


class Rig:
  """A queue whose host completes whatever the test says."""

  def __init__(self, pool, config=None, *, step=2, seed=0, **window):
    config = config or {}
    config = curation.CurationConfig(**config)
    self.step = step
    old = config.replayed(step)
    self.queue = queue_lib.GroupQueue(
      pool,
      window_lib.WindowConfig(
        **{
          "in_flight": 8,
          "window": 8,
          "max_lag": None,
          "groups_per_step": step - old,
        }
        | window
      ),
      chain.build(config, pool, trains),
      replay.Replay(pool, old, config.replay_steps, seed) if old else None,
    )

  async def complete(self, *groups):
    """Completes groups under the next tickets; returns those."""
    tickets = []
    for one in groups:
      ticket = await asyncio.wait_for(self.queue.admit(), 10)
      one = dataclasses.replace(
        one, index=ticket.index, number=ticket.number, attempt=ticket.attempt
      )
      await asyncio.to_thread(self.queue.complete, one)
      tickets.append(ticket)
    return tickets

  def take(self):
    return self.queue.take(self.step, timeout=0)

  def starves(self):
    """Takes, and finds that what there is does not fill a batch."""
    with pytest.raises(errors.PoolError, match="no batch"):
      self.take()

  def counts(self):
    return {name: n for name, n in self.queue.curated().items() if n}


def indices(groups):
  return [one.index for one in groups]


async def test_groups_without_a_gradient_are_dropped_and_replaced(pool):
  rig = Rig(pool, {"zero_variance": True})
  await rig.complete(group(0), group(1, scores=(1, 1)), group(2, scores=(0, 0)))
  rig.starves()
  assert rig.queue.stats()["head"] == 3  # the window has moved on
  [ticket] = await rig.complete(group(3))
  assert ticket[:3] == (3, 3, 0)  # a new task, not one of the dropped
  assert indices(rig.take()) == [0, 3]
  assert rig.counts() == {names.CURATION_ZERO_VARIANCE: 2}


async def test_a_dropped_task_comes_again_if_the_filter_says_so(pool):
  rig = Rig(
    pool,
    {"zero_variance": True, "resubmit": ("zero_variance",)},
    attempts=2,
  )
  await rig.complete(group(0, scores=(1, 1)))
  rig.starves()
  [ticket] = await rig.complete(group(0, scores=(1, 1)))
  assert ticket[:3] == (1, 0, 1)
  rig.starves()
  # It has had its two attempts.
  tickets = await rig.complete(group(1), group(2))
  assert [ticket[:3] for ticket in tickets] == [(2, 1, 0), (3, 2, 0)]
  assert indices(rig.take()) == [2, 3]
  assert rig.counts() == {
    names.CURATION_ZERO_VARIANCE: 2,
    names.CURATION_RESUBMITTED: 1,
  }
  [claim] = pool.claims()
  assert (claim.trained, claim.dropped, claim.again) == ((2, 3), (1,), (0,))


async def test_a_synchronous_step_is_filled_up(pool):
  rig = Rig(pool, {"zero_variance": True}, max_lag=0)
  await rig.complete(group(0), group(1, scores=(1, 1)))
  assert rig.queue.stats()["admissible"] == 0
  rig.starves()
  assert rig.queue.stats()["admissible"] == 1
  await rig.complete(group(2))
  assert indices(rig.take()) == [0, 2]
  assert rig.queue.stats()["admissible"] == 0  # not before the commit


async def test_a_batch_that_drops_everything_says_so(pool, caplog):
  rig = Rig(pool, {"zero_variance": True}, step=1)
  await rig.complete(*(group(i, scores=(1, 1)) for i in range(8)))
  rig.starves()
  await rig.complete(*(group(i, scores=(1, 1)) for i in range(8)))
  rig.starves()
  [line] = [record.message for record in caplog.records]
  assert "step 1: 8 groups were dropped for a batch of 1, which has 0" in line
  assert f"{names.CURATION_ZERO_VARIANCE} 8" in line


async def test_groups_too_short_or_too_long_are_dropped(pool):
  rig = Rig(pool, {"min_tokens": 3, "max_tokens": 5})
  await rig.complete(
    group(0, tokens=[1]),
    group(1, tokens=[1, 2]),
    group(2, tokens=[1, 2, 3, 4, 5]),
    group(3, tokens=[1, 2, 3, 4]),
  )
  assert indices(rig.take()) == [1, 3]
  assert rig.counts() == {names.CURATION_LENGTH: 2}


async def test_groups_of_old_weights_are_dropped(pool):
  rig = Rig(pool, {"max_mean_lag": 1.0})
  for step in (1, 2):
    await rig.complete(*(group(2 * step + i, version=step - 1) for i in (0, 1)))
    rig.take()
    rig.queue.commit(step)
  await rig.complete(group(4), group(5, version=1), group(6, version=2))
  assert indices(rig.take()) == [5, 6]
  assert rig.counts() == {names.CURATION_STALENESS: 1}


@pytest.mark.parametrize("by, kept", [("tokens", [0, 2]), ("task", [0, 1])])
async def test_what_was_trained_lately_is_not_trained_again(pool, by, kept):
  rig = Rig(pool, {"duplicates": by})
  same_tokens = group(1, tokens=[0, 0])
  same_task = group(0, tokens=[5, 5])
  await rig.complete(group(0), same_tokens, same_task)
  assert indices(rig.take()) == kept
  if by == "task":
    await rig.complete(group(3))
    rig.starves()  # group 2 goes, and group 3 alone is not a batch
  assert rig.counts() == {names.CURATION_DUPLICATES: 1}


async def test_the_horizon_of_duplicates_survives_a_restart(pool):
  config = {"duplicates": "task", "duplicate_horizon": 3}
  rig = Rig(pool, config)
  await rig.complete(*map(group, range(4)))
  for step in (1, 2):
    rig.take()
    rig.queue.commit(step)
  again = Rig(pool, config)
  again.queue.restore(json.loads(json.dumps(rig.queue.state())))
  # Task 0 is forgotten, task 1 is not.
  await again.complete(group(1), group(0), group(9))
  assert indices(again.take()) == [5, 6]
  assert again.counts() == {names.CURATION_DUPLICATES: 1}


async def test_a_domain_over_its_quota_waits_for_the_next_batch(pool):
  rig = Rig(pool, {"quotas": {"code": 0.5}}, max_lag=0)
  await rig.complete(group(0, domain="code"), group(1, domain="code"))
  rig.starves()
  # What waits trains nothing now: one more may be begun.
  await rig.complete(group(2))
  assert indices(rig.take()) == [0, 2]
  rig.queue.commit(1)
  assert rig.queue.stats()["admissible"] == 1
  await rig.complete(group(3))
  assert indices(rig.take()) == [1, 3]
  assert rig.counts() == {names.CURATION_WAITED: 1}


async def test_a_domain_over_its_quota_twice_is_dropped(pool):
  rig = Rig(pool, {"quotas": {"code": 0.5}})
  await rig.complete(*(group(i, domain="code") for i in range(3)), group(3))
  assert indices(rig.take()) == [0, 3]
  rig.queue.commit(1)
  rig.starves()
  assert rig.counts() == {names.CURATION_WAITED: 2, names.CURATION_QUOTAS: 1}
  await rig.complete(group(4))
  assert indices(rig.take()) == [1, 4]
  assert pool.claims()[-1].dropped == (2,)


async def test_what_waited_when_the_run_died_is_there_again(pool):
  config = {"quotas": {"code": 0.5}}
  rig = Rig(pool, config)
  await rig.complete(*(group(i, domain="code") for i in range(2)), group(2))
  assert indices(rig.take()) == [0, 2]
  rig.queue.commit(1)
  again = Rig(pool, config)
  again.queue.restore(rig.queue.state())
  await again.complete(group(3))
  assert indices(again.take()) == [1, 3]


async def test_a_cut_off_episode_is_masked_and_keeps_its_reward(pool):
  rig = Rig(pool, {"overlong": "mask"}, step=1)
  cut = group(0, stop=LENGTH)
  whole = dataclasses.replace(
    cut, episodes=(group(0).episodes[0], cut.episodes[1])
  )
  await rig.complete(whole, group(1))
  [one] = rig.take()
  assert [len(e.completions) for e in one.episodes] == [1, 0]
  assert [e.perf for e in one.episodes] == [1.0, 0.0]
  rig.take()
  assert rig.counts() == {names.CURATION_OVERLONG: 1}


async def test_a_long_episode_is_penalised_by_its_length(pool):
  config = {
    "overlong": "penalize",
    "overlong_tokens": 8,
    "overlong_margin": 4,
  }
  rig = Rig(pool, config, step=4)
  await rig.complete(
    *(group(i, tokens=range(size - 1)) for i, size in enumerate((4, 5, 8, 20)))
  )
  penalties = [
    sum(r.value for r in one.episodes[0].rewards if r.name == "overlong")
    for one in rig.take()
  ]
  assert penalties == [0.0, -0.25, -1.0, -1.0]
  assert rig.counts() == {names.CURATION_OVERLONG: 3}


async def test_a_group_with_a_cut_off_episode_is_dropped(pool):
  rig = Rig(pool, {"overlong": "drop", "resubmit": ("overlong",)}, step=1)
  await rig.complete(group(0, stop=LENGTH), group(1))
  assert indices(rig.take()) == [1]
  assert rig.counts() == {
    names.CURATION_OVERLONG_DROPPED: 1,
    names.CURATION_RESUBMITTED: 1,
  }


async def test_later_scores_count_for_training_and_for_filters(pool):
  rig = Rig(pool, {"zero_variance": True}, step=1)
  await rig.complete(group(0, scores=(1, 1)), group(1))
  answer = types.Reward("answer", types.Component.PERF, 0.25)
  style = types.Reward("style", types.Component.PROCESS, -0.5, step=0)
  pool.annotate(0, {"comment": "looks fine"})
  edits.score(pool, 0, {"group0-1": [answer, style]})
  edits.score(pool, 0, {"group0-1": [dataclasses.replace(answer, value=0.5)]})
  [one] = rig.take()
  assert one.index == 0
  assert one.episodes[0].rewards == group(0).episodes[0].rewards
  assert set(one.episodes[1].rewards) == {
    dataclasses.replace(answer, value=0.5),
    style,
  }
  assert rig.counts() == {names.CURATION_RESCORED: 1}
  assert pool.get(0).episodes[1].perf == 1  # what is stored stays


async def test_a_score_that_cannot_be_read_is_an_error(pool):
  rig = Rig(pool, step=1)
  await rig.complete(group(0))
  pool.annotate(0, {"scores": {"group0-0": [["answer", "luck", 1.0, None]]}})
  with pytest.raises(errors.PoolError, match=r"not \[name, component"):
    rig.take()


async def run(pool, config, steps):
  """Trains `steps` steps of new groups; returns the batches' indices."""
  rig = Rig(pool, config, step=4)
  batches = []
  for step in range(1, steps + 1):
    while rig.queue.stats()["available"] < 4:
      await rig.complete(group(0))
    batches.append(indices(rig.take()))
    rig.queue.commit(step)
  return rig, batches


async def test_a_share_of_each_batch_was_trained_before(pool):
  config = {"replay": 0.25, "replay_steps": 2}
  rig, batches = await run(pool, config, 5)
  assert batches[0] == [0, 1, 2]  # there is nothing to replay yet
  for number, batch in enumerate(batches[1:], 1):
    fresh = {3 * number, 3 * number + 1, 3 * number + 2}
    [old] = set(batch) - fresh
    recent = batches[max(0, number - 2) : number]
    assert old in {i for b in recent for i in b}
    assert batch.index(old) == 2  # not all in one update
  assert rig.counts() == {names.CURATION_REPLAYED: 4}
  # A claim names what it consumes; a step that is repeated replays the same.
  assert [len(claim.trained) for claim in pool.claims()] == [3] * 5
  again = Rig(pool, config, step=4)
  assert [indices(again.take()) for _ in range(5)] == batches


async def test_lost_steps_see_the_same_edits_and_memories(pool):
  config = {"duplicates": "task", "overlong": "mask", "zero_variance": True}
  rig = Rig(pool, config)
  saved = rig.queue.state()
  await rig.complete(
    group(0), group(0, scores=(1, 1)), group(1, stop=LENGTH), group(1)
  )
  first = rig.take()
  rig.queue.commit(1)
  assert indices(first) == [0, 2]
  again = Rig(pool, config)
  again.queue.restore(saved)
  second = again.take()
  assert indices(second) == [0, 2]
  assert [len(e.completions) for e in second[1].episodes] == [0, 0]
  again.queue.commit(1)
  assert (
    again.queue.state()["curation"]["memory"]
    == (rig.queue.state()["curation"]["memory"])
  )
  again.starves()  # group 3 repeats task 1
  assert again.counts()[names.CURATION_DUPLICATES] == 1


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"duplicates": "all"}, "duplicates is 'all'"),
    ({"overlong": "cut"}, "overlong is 'cut'"),
    ({"overlong": "penalize"}, "needs 0 < overlong_margin"),
    ({"resubmit": ("luck",)}, "resubmit is 'luck'"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 9, "max_tokens": 5}, "max_tokens is 5, below"),
    ({"max_mean_lag": -0.5}, "max_mean_lag is -0.5"),
    ({"replay": 1.0}, "replay is 1.0"),
    ({"replay_steps": 0}, "replay_steps is 0"),
    ({"duplicate_horizon": 0}, "duplicate_horizon is 0"),
    ({"quotas": {"code": 0}}, "quota of 'code' is 0"),
  ],
)
def test_bad_configs_are_refused(fields, message):
  with pytest.raises(errors.ConfigError, match=message):
    curation.CurationConfig(**fields)
