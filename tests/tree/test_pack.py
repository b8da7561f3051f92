"""Packing: every row recovered, replays exact, limits kept, bad input named."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from toy import VOCAB, random_samples, sample

from forge_jax import errors
from forge_jax.tree import pack

CONFIG = pack.PackConfig(tokens=32, edges=20, rows=24, packs=2, block=8)


def _ancestors(batch, b, node):
  """Token ids from the root to a node, read off the layout."""
  end_T = batch.layout.subtree_end_BT[b]
  index = np.arange(len(end_T))
  seen = (index <= node) & (node < end_T)
  positions = batch.position_BT[b][seen]
  assert positions.tolist() == list(range(len(positions)))
  return batch.tokens_BT[b][seen].tolist()


def _recovered(batches):
  """(context, token, old log-probability, ...) of every row, sorted."""
  rows = []
  for batch in batches:
    for b, m in zip(*np.nonzero(batch.weight_BM), strict=True):
      edge = batch.row_edge_BM[b, m]
      rows.append(
        (
          _ancestors(batch, b, batch.edge_parent_BE[b, edge]),
          int(batch.edge_token_BE[b, edge]),
          float(batch.old_logprob_BM[b, m]),
          float(batch.advantage_BM[b, m]),
          float(batch.weight_BM[b, m]),
          int(batch.version_BM[b, m]),
        )
      )
  return sorted(rows)


def _original(samples):
  rows = []
  for s in samples:
    whole = [*s.prompt_ids.tolist(), *s.response_ids.tolist()]
    for i in np.flatnonzero(s.weights):
      depth = len(s.prompt_ids) + i
      rows.append(
        (
          whole[:depth],
          whole[depth],
          float(s.logprobs[i]),
          float(s.advantages[i]),
          float(s.weights[i]),
          int(s.versions[i]),
        )
      )
  return sorted(rows)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 14))
def test_every_row_is_recovered_exactly_once(seed, count):
  samples = random_samples(np.random.default_rng(seed), count)
  batches, stats = pack.pack(samples, CONFIG, vocab_size=VOCAB)
  assert _recovered(batches) == _original(samples)
  assert stats.rows == sum(int((b.weight_BM != 0).sum()) for b in batches)
  assert stats.edges == sum(int((b.edge_token_BE >= 0).sum()) for b in batches)
  assert stats.unique_tokens <= stats.packed_tokens <= stats.request_tokens
  assert stats.padded_tokens == len(batches) * 2 * 32
  shapes = {tuple(x.shape for x in jax.tree.leaves(b)) for b in batches}
  assert len(shapes) <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_samples_does_not_matter(seed):
  rng = np.random.default_rng(seed)
  samples = random_samples(rng, 12, longest=6)
  shuffled = [samples[i] for i in rng.permutation(len(samples))]
  a, a_stats = pack.pack(samples, CONFIG, vocab_size=VOCAB)
  b, b_stats = pack.pack(shuffled, CONFIG, vocab_size=VOCAB)
  assert a_stats == b_stats
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_edges_are_distinct_and_shared_by_equal_samples():
  rng = np.random.default_rng(0)
  samples = [sample(f"s{i}", [1, 2], [3, 4], rng=rng) for i in range(5)]
  (batch,), stats = pack.pack(samples, CONFIG, vocab_size=VOCAB)
  assert (stats.edges, stats.rows, stats.packs) == (2, 10, 1)
  # Tokens 1 2 3 predict 3 and 4; token 4 itself predicts nothing.
  assert stats.packed_tokens == 3 and stats.request_tokens == 15
  assert stats.packed_pairs == 6 and stats.request_pairs == 30
  assert batch.tokens_BT[0, :3].tolist() == [1, 2, 3]
  assert batch.version_BM[0, 10:].tolist() == [-1] * 14


def test_a_new_pack_replays_the_whole_prefix():
  rng = np.random.default_rng(1)
  prompt = [1] * 20
  samples = [
    sample(f"s{i}", prompt, [2, i, 0, 0, 0, 0, 0], rng=rng) for i in range(4)
  ]
  batches, stats = pack.pack(samples, CONFIG, vocab_size=VOCAB)
  # 26 tokens, then 5 new: the second sample fits (31), the third does not.
  assert stats.packs == 2 and len(batches) == 1
  assert stats.packed_tokens == 2 * 31 and stats.unique_tokens == 26 + 15
  for b in range(2):
    assert batches[0].tokens_BT[b, :21].tolist() == [*prompt, 2]


@pytest.mark.parametrize("name, limit", [("edges", 5), ("rows", 7)])
def test_edges_and_rows_also_close_a_pack(name, limit):
  rng = np.random.default_rng(2)
  config = dataclasses.replace(CONFIG, **{name: limit})
  samples = [sample(f"s{i}", [1], [2, 3, i], rng=rng) for i in range(6)]
  batches, stats = pack.pack(samples, config, vocab_size=VOCAB)
  assert _recovered(batches) == _original(samples)
  # Edges: 3 of the first sample and one of each next, so 3 samples a pack.
  assert stats.packs == {"edges": 2, "rows": 3}[name]


def test_edges_of_an_earlier_pack_do_not_count_in_the_next():
  rng = np.random.default_rng(8)
  config = dataclasses.replace(CONFIG, edges=3)
  samples = [
    sample(f"s{i}", [1], [2, 3, 4, i], rng=rng, weights=weights)
    for i, weights in enumerate(
      [[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1]]
    )
  ]
  batches, stats = pack.pack(samples, config, vocab_size=VOCAB)
  assert _recovered(batches) == _original(samples)
  assert stats.rows == 8 and stats.edges <= 3 * stats.packs


def test_samples_without_loss_are_left_out():
  rng = np.random.default_rng(3)
  silent = sample("silent", [1], [2, 3], rng=rng, weights=[0, 0])
  empty = sample("empty", [1, 2], [], rng=rng)
  batches, stats = pack.pack([silent, empty], CONFIG, vocab_size=VOCAB)
  assert batches == [] and stats == pack.PackStats()


def test_an_empty_prompt_may_have_a_silent_first_token():
  rng = np.random.default_rng(4)
  s = sample("s", [], [1, 2], rng=rng, weights=[0, 1])
  batches, _ = pack.pack([s], CONFIG, vocab_size=VOCAB)
  assert _recovered(batches) == _original([s])


def test_stats_add_up():
  rng = np.random.default_rng(5)
  a = pack.pack(random_samples(rng, 5), CONFIG, vocab_size=VOCAB)[1]
  total = a + a
  assert total.rows == 2 * a.rows
  assert total.merge_ratio == pytest.approx(a.merge_ratio)
  assert pack.PackStats().fill == 0


BAD = {
  "logprobs has shape (3,), but 2": {"logprobs": np.zeros(3, np.float32)},
  "versions has shape": {"versions": np.zeros(1, np.int32)},
  "response_ids[1] is -4": {"response_ids": np.array([1, -4])},
  "prompt_ids[0] is 13, outside the vocabulary of 13": {
    "prompt_ids": np.array([13])
  },
  "logprobs[1] is nan": {"logprobs": np.array([0, np.nan])},
  "logprobs[0] is -inf": {"logprobs": np.array([-np.inf, 0])},
  "advantages[0] is inf": {"advantages": np.array([np.inf, 0])},
  "weights[1] is nan": {"weights": np.array([1, np.nan])},
  "needs 34 tokens, but a pack holds 32": {"prompt_ids": np.ones(33, np.int32)},
  "first token bears a loss": {"prompt_ids": np.zeros(0, np.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_sample_is_named(message):
  rng = np.random.default_rng(6)
  good = sample("good", [1], [2, 3], rng=rng)
  bad = dataclasses.replace(good, name="e7/2", **BAD[message])
  with pytest.raises(errors.SampleError) as caught:
    pack.pack([good, bad], CONFIG, vocab_size=VOCAB)
  assert "sample e7/2" in str(caught.value) and message in str(caught.value)


def test_too_many_rows_for_any_pack():
  rng = np.random.default_rng(7)
  config = dataclasses.replace(CONFIG, rows=3)
  with pytest.raises(errors.SampleError, match=r"s needs 4 rows.*holds 3"):
    pack.pack([sample("s", [1], [1] * 4, rng=rng)], config, vocab_size=VOCAB)


def test_an_impossible_shape_is_refused():
  with pytest.raises(errors.ConfigError, match="block=48 does not divide"):
    pack.PackConfig(tokens=64, block=48)
  with pytest.raises(errors.ConfigError, match="rows=0"):
    pack.PackConfig(rows=0)
