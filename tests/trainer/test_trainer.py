"""What a trainer step tells about its trees, checked by hand."""

import logging
import pathlib
import sys

import jax
import numpy as np
import pytest

from forge_jax import types
from forge_jax.model import sharding
from forge_jax.observe import names
from forge_jax.trainer import credit, trainer, update
from forge_jax.tree import merge, pack

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny

TASK = types.Task(id="toy/train/0", domain="toy", index=0, payload={})
PACK = pack.PackConfig(tokens=256, edges=256, rows=256, block=32, buckets=2)
GROUPS, MEMBERS, TURNS, RESPONSE = 2, 3, 8, 4


def make(**config):
  up = update.Updater(
    tiny.decoder(),
    update.UpdateConfig(block=PACK.block, head_chunk=64, attention="reference"),
    sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
  )
  return up, trainer.Trainer(
    up,
    # The groups' log-probabilities are invented, and differ from the model's.
    trainer.TrainerConfig(
      **{"groups_per_step": GROUPS, "minibatches": 2, "mismatch_warn": 1.0}
      | config
    ),
    credit.CreditConfig(),
    PACK,
    vocab_size=tiny.MODEL.vocab_size,
  )


def groups(seed=0, *, turns=TURNS, header=False, rewards=(1.0, 0.0, 0.0)):
  """Episodes whose history grows, perhaps behind a changing header."""
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(0, 64, n).astype(np.int32)

  def episode(member, prompt):
    history, completions = prompt, []
    for number in range(turns):
      response = ids(RESPONSE)
      completions.append(
        types.Completion(
          id=str(number),
          prompt_ids=np.concatenate([ids(6 if header else 0), history]),
          response_ids=response,
          logprobs=np.full(RESPONSE, -4.0, np.float32),
          versions=np.zeros(RESPONSE, np.int32),
          stop_reason=types.StopReason.STOP,
        )
      )
      history = np.concatenate([history, response, ids(3)])
    reward = types.Reward("r", types.Component.PERF, rewards[member])
    return types.Episode(
      id=f"{prompt.tobytes().hex()}-{member}",
      task=TASK,
      member=member,
      seed=0,
      status=types.EpisodeStatus.COMPLETED,
      completions=tuple(completions),
      rewards=(reward,),
    )

  return [
    types.Group(index, TASK, tuple(episode(m, prompt) for m in range(MEMBERS)))
    for index, prompt in enumerate(ids(20) for _ in range(GROUPS))
  ]


def by_hand(step_groups):
  """Tokens and FLOPs of the requests, and of each group's forest."""
  flops = tiny.MODEL.flops()
  tokens, work = np.zeros(2), np.zeros(2)
  for group in step_groups:
    whole = [
      np.concatenate([c.prompt_ids, c.response_ids])
      for episode in group.episodes
      for c in episode.completions
    ]
    forest = merge.merge([one[:-1] for one in whole])
    edges = {one[:i].tobytes() for one in whole for i in _trained(one)}
    for i, (count, pairs, heads) in enumerate(
      (
        (
          sum(len(one) - 1 for one in whole),
          sum((len(one) - 1) * len(one) // 2 for one in whole),
          RESPONSE * len(whole),
        ),
        (
          len(forest.tokens_T),
          int((forest.position_T + 1).sum()),
          len(edges),
        ),
      )
    ):
      tokens[i] += count
      work[i] += flops.token * count + flops.pair * pairs + flops.edge * heads
  return tokens, work


def _trained(one):
  return range(len(one) - RESPONSE + 1, len(one) + 1)


def test_a_step_tells_what_its_trees_save(caplog):
  up, made = make()
  step_groups = groups()
  (requested, unique), work = by_hand(step_groups)
  with caplog.at_level(logging.WARNING, "forge_jax"):
    found = made.take_step(made.prepare(step_groups))
  assert not caplog.records
  assert found[names.TREE_REQUEST_TOKENS] == requested
  assert found[names.TREE_UNIQUE_TOKENS] == unique
  assert found[names.TREE_MERGE_RATIO] == pytest.approx(requested / unique)
  assert found[names.TREE_POSSIBLE_RATIO] == pytest.approx(requested / unique)
  assert found[names.TREE_FLOP_BOUND] == pytest.approx(work[0] / work[1])
  assert found[names.TREE_COLLAPSED] == 0
  assert 0 < found[names.TREE_ACHIEVED] < 1
  assert 0 < found[names.TREE_FILL] <= 1
  assert found[names.TREE_REPLAY] == 0
  assert found[names.TREE_BATCHES] == 2  # an update a group
  assert found[names.TREE_SHAPES] == up.traces == 1


def test_a_shape_is_compiled_and_logged_once(caplog):
  up, made = make()
  with caplog.at_level(logging.INFO, "forge_jax"):
    for step in range(6):
      found = made.take_step(
        made.prepare(groups(step, turns=1 if step % 2 else TURNS))
      )
  lines = [r.message for r in caplog.records if "new shape" in r.message]
  assert len(lines) == len(set(lines)) == found[names.TREE_SHAPES] == up.traces
  assert len(lines) == PACK.buckets == 2
  assert "1 packs of 256 tokens, 256 edges, 256 rows" in lines[0]


def test_a_collapse_warns_once_a_step_and_says_why(caplog):
  _, made = make()
  with caplog.at_level(logging.WARNING, "forge_jax"):
    first = made.take_step(made.prepare(groups(header=True)))
    made.take_step(made.prepare(groups(1, header=True)))
  assert first[names.TREE_COLLAPSED] == 1
  assert first[names.TREE_MERGE_RATIO] < first[names.TREE_POSSIBLE_RATIO] / 2
  assert [r.message[:7] for r in caplog.records] == ["step 1:", "step 2:"]
  assert (
    "of requests differ from their predecessor" in caplog.records[0].message
  )


def test_a_step_without_a_gradient_still_has_figures():
  _, made = make()
  found = made.take_step(made.prepare(groups(rewards=(0.5, 0.5, 0.5))))
  tree = {n: v for n, v in found.items() if n.startswith("tree/")}
  assert len(tree) == 11
  assert np.isfinite(list(tree.values())).all()
  assert tree[names.TREE_REQUEST_TOKENS] == tree[names.TREE_COLLAPSED] == 0


class Stopped(Exception):
  pass


def test_a_step_may_be_given_up_until_its_first_update():
  _, one = make()
  before = jax.tree.map(np.array, one.state)
  calls = []

  def count():
    calls.append(None)

  def stop():
    raise Stopped

  with pytest.raises(Stopped):
    one.take_step(one.prepare(groups()), give_up=stop)
  assert one.step == 0
  for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(one.state), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  one.take_step(one.prepare(groups()), give_up=count)
  # Each of the two updates has one batch; the second is not given up.
  assert one.step == 1 and len(calls) == 1
  _, other = make()
  other.take_step(other.prepare(groups()))
  for a, b in zip(
    jax.tree.leaves(other.state), jax.tree.leaves(one.state), strict=True
  ):
    np.testing.assert_array_equal(a, b)
