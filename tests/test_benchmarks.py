"""The tree benchmark's workloads, arms and figures, without its timings."""

import dataclasses

from flax import nnx
import numpy as np
import pytest

from experiments.benchmarks import (
  tree,
  tree_arms,
  tree_checks,
  tree_workloads,
)
from forge_jax.model import decoder as decoder_lib
from forge_jax.tree import pack

VOCAB = tree_checks.MODEL.vocab_size
COST = tree_arms.model_cost(tree_checks.MODEL)
PLAN = tree_arms.Plan(COST, VOCAB, block=16, repeats=3)
NAMES = list(tree_workloads.WORKLOADS)


def group(name, seed=0):
  workload = tree_workloads.reduced(tree_workloads.WORKLOADS[name])
  rng = np.random.default_rng(seed)
  return tree_workloads.episodes(workload, rng, VOCAB)


def arms(name):
  episodes = group(name)
  return PLAN.build(
    tree_workloads.requests(episodes), tree_workloads.trajectories(episodes)
  )


@pytest.fixture(scope="module")
def equivalence():
  return tree_checks.Equivalence(wide=False)


@pytest.mark.parametrize(
  ("name", "extends"),
  [("append", True), ("strip", False), ("compaction", None), ("none", False)],
)
def test_what_becomes_a_trajectory(name, extends):
  episodes = group(name)
  requests = tree_workloads.requests(episodes)
  histories = tree_workloads.trajectories(episodes)
  if extends is None:  # broken where the history is rewritten, only there
    assert len(episodes) < len(histories) < len(requests)
  else:
    assert len(histories) == len(episodes if extends else requests)
  rows = [
    sum(map(lambda s: np.count_nonzero(s.weights), x))
    for x in (requests, histories)
  ]
  assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["append", "compaction"])
def test_trajectories_have_the_gradient_of_the_requests(name, equivalence):
  episodes = group(name)
  a = equivalence.separate(tree_workloads.requests(episodes))
  b = equivalence.separate(tree_workloads.trajectories(episodes))
  assert tree_checks.worst(a[1], b[1]) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_exact_flops_are_those_of_the_samples(name):
  samples = tree_workloads.requests(group(name))
  config = dataclasses.replace(tree_checks.PACK, tokens=256, edges=256)
  batches, stats = pack.pack(
    samples, config, vocab_size=VOCAB, cost=COST, share=False
  )
  lengths = np.array(
    [len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples]
  )
  edges = sum(len(s.response_ids) for s in samples)
  want = COST.total(lengths.sum(), (lengths * (lengths + 1) // 2).sum(), edges)
  got = sum(tree_arms.batch_flops(batch, COST) for batch in batches)
  assert got == pytest.approx(want, rel=1e-12)
  assert want == COST.total(
    stats.request_tokens, stats.request_pairs, stats.rows
  )


def test_the_linear_cost_is_six_times_the_weights():
  _, params = nnx.split(decoder_lib.abstract(tree_checks.MODEL))
  weights = sum(
    leaf.size
    for name, leaf in decoder_lib.flatten(params).items()
    if name.endswith("kernel")
  )
  assert COST.token == 6 * weights


@pytest.mark.parametrize("name", NAMES)
def test_the_arms_of_a_workload(name):
  built = arms(name)
  requests = built["tree"].stats.samples
  assert built["tree"].batches == 1 or name == "none"
  assert built["padded"].batches == requests == built["packed"].stats.samples
  assert ("trajectory" in built) == (name not in ("strip", "grpo", "none"))
  for label, arm in built.items():
    stats = arm.stats
    unit = (
      arm.batches
      if label == "padded"
      else COST.total(
        *(
          (stats.unique_tokens, stats.unique_pairs, stats.edges)
          if label == "tree"
          else (stats.request_tokens, stats.request_pairs, stats.rows)
        )
      )
    )
    # One second a unit makes as many seconds as units, however sampled.
    times = [arm.part(i).size for i in range(PLAN.repeats)]
    assert arm.seconds(times) == pytest.approx(unit)
    assert arm.spread(times) == pytest.approx(0, abs=1e-12)


def test_the_best_size_of_a_plain_pack():
  assert tree_arms._bins([9, 6, 5, 4, 1], 10) == 3
  assert tree_arms._bins([10], 10) == 1


def test_a_measurement_has_all_figures():
  workload = tree_workloads.reduced(tree_workloads.WORKLOADS["append"])
  stepper = tree_arms.Stepper(tree_checks.MODEL, PLAN.block)
  row = tree.measure("append", workload, stepper, PLAN)
  assert row["recompilations"] == 0
  assert row["flop_bound_fraction"] == pytest.approx(
    row["vs_packed"] / row["bound_packed"]
  )
  assert row["bound_packed"] > row["bound_trajectory"] > 1
  assert min(row["vs_packed"], row["vs_padded"], row["host_fraction"]) > 0
  assert row["temporary_gb"]["tree"] <= row["packed_as_tree_gb"]
  tree.show(row)


def test_a_compilation_is_counted():
  with tree_checks.compilations() as compiled:
    stepper = tree_arms.Stepper(tree_checks.MODEL, 16)
    assert compiled() > 0
  del stepper
