"""Packing: every row recovered, packs full and even, bad input named."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from toy import VOCAB, random_samples, sample

from forge_jax import errors
from forge_jax.tree import cost, pack

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


CONFIGS = [
  CONFIG,
  dataclasses.replace(CONFIG, packs=1, buckets=1),
  dataclasses.replace(CONFIG, tokens=64, edges=30, rows=30, packs=3),
  dataclasses.replace(CONFIG, tokens=128, edges=128, rows=128, buckets=5),
  dataclasses.replace(CONFIG, tokens=256, edges=14, rows=200, packs=1),
]
COST = cost.Cost(token=100.0, pair=3.0, edge=40.0)


@settings(max_examples=100)
@given(
  st.integers(0, 2**32 - 1),
  st.integers(0, 20),
  st.sampled_from(CONFIGS),
  st.booleans(),
)
def test_every_row_is_recovered_exactly_once(seed, count, config, share):
  samples = random_samples(np.random.default_rng(seed), count)
  batches, stats = pack.pack(
    samples, config, vocab_size=VOCAB, cost=COST, share=share
  )
  assert _recovered(batches) == _original(samples)
  assert stats.rows == sum(int((b.weight_BM != 0).sum()) for b in batches)
  assert stats.edges == sum(int((b.edge_token_BE >= 0).sum()) for b in batches)
  assert stats.unique_tokens <= stats.packed_tokens <= stats.request_tokens
  assert stats.unique_pairs <= stats.packed_pairs <= stats.request_pairs
  assert stats.packed_pairs <= stats.executed_pairs
  assert stats.unique_edges <= stats.edges <= stats.padded_edges
  assert stats.batches == len(batches)
  assert stats.packs == sum(int(b.weight_BM.any(1).sum()) for b in batches)
  # Samples are counted where they are, once for each of their tokens.
  assert stats.request_tokens == sum(int(b.samples_BT.sum()) for b in batches)
  for b in batches:
    used = b.samples_BT > 0
    assert stats.request_tokens >= used.sum()
    assert (np.diff(used.astype(int)) <= 0).all()  # padding comes last
    alone_BT = np.broadcast_to(np.arange(1, used.shape[1] + 1), used.shape)
    end_BT = b.layout.subtree_end_BT
    np.testing.assert_array_equal(end_BT[~used], alone_BT[~used])


@settings(max_examples=60)
@given(
  st.integers(0, 2**32 - 1),
  st.integers(0, 20),
  st.sampled_from(CONFIGS),
  st.booleans(),
)
def test_a_batch_takes_the_smallest_shape(seed, count, config, share):
  samples = random_samples(np.random.default_rng(seed), count)
  batches, stats = pack.pack(samples, config, vocab_size=VOCAB, share=share)
  shapes = config.shapes()
  assert stats.padded_tokens == sum(b.tokens_BT.size for b in batches)
  for b in batches:
    assert b.tokens_BT.shape[0] == config.packs
    shape = (b.tokens_BT, b.edge_token_BE, b.row_edge_BM)
    shape = pack.Shape(*(x.shape[1] for x in shape))
    i = shapes.index(shape)
    used = (b.samples_BT > 0, b.edge_token_BE >= 0, b.weight_BM != 0)
    need = np.array([x.sum(1).max() for x in used])
    assert i == 0 or (need > np.array(shapes[i - 1])).any()
    same = {tuple(x.shape for x in jax.tree.leaves(c)) for c in batches}
    assert len(same) == len({c.tokens_BT.shape for c in batches})


@pytest.mark.parametrize("tokens, block", [(32, 8), (32, 32), (1280, 128)])
@pytest.mark.parametrize("buckets", [1, 3, 4, 64])
def test_shapes_are_few_and_whole_blocks(tokens, block, buckets):
  config = pack.PackConfig(
    tokens=tokens, edges=17, rows=40, block=block, buckets=buckets
  )
  shapes = config.shapes()
  assert len(shapes) == min(buckets, tokens // block)
  assert shapes[-1] == pack.Shape(tokens, 17, 40)
  assert shapes == sorted(shapes) and len(set(shapes)) == len(shapes)
  for shape in shapes:
    assert shape.tokens % block == 0
    assert tokens * shape.edges >= 17 * shape.tokens
    assert tokens * shape.rows >= 40 * shape.tokens


def _first_fit_decreasing(lengths, limit):
  room = []
  for length in sorted(lengths, reverse=True):
    i = next((i for i, left in enumerate(room) if left >= length), len(room))
    room += [limit] * (i == len(room))
    room[i] -= length
  return len(room)


def _inputs(sample):
  return len(sample.prompt_ids) + int(np.flatnonzero(sample.weights)[-1])


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_never_more_packs_than_first_fit_decreasing(seed, count, share):
  samples = random_samples(np.random.default_rng(seed), count, longest=16)
  samples = [s for s in samples if s.weights.any()]
  config = pack.PackConfig(tokens=64, edges=999, rows=999, block=8)
  _, stats = pack.pack(samples, config, vocab_size=VOCAB, share=share)
  limit = _first_fit_decreasing(map(_inputs, samples), 64)
  assert stats.packs <= limit


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(CONFIGS), st.booleans())
def test_the_order_of_samples_does_not_matter(seed, config, share):
  rng = np.random.default_rng(seed)
  samples = random_samples(rng, 12, longest=6)
  shuffled = [samples[i] for i in rng.permutation(len(samples))]
  a, b = (
    pack.pack(x, config, vocab_size=VOCAB, cost=COST, share=share)
    for x in (samples, shuffled)
  )
  assert a[1] == b[1]
  jax.tree.map(np.testing.assert_array_equal, a[0], b[0])


def _episodes(rng, *, prompt, turns, rollouts=8, groups=4):
  """Rollouts of a few prompts; each turn's prompt is the whole history."""
  samples = []
  for group in range(groups):
    start = rng.integers(0, VOCAB, prompt)
    for rollout in range(rollouts):
      history = start
      for turn in range(turns):
        action = rng.integers(0, VOCAB, rng.integers(12, 20))
        name = f"{group}/{rollout}/{turn}"
        samples.append(sample(name, history, action, rng=rng))
        seen = rng.integers(0, VOCAB, rng.integers(12, 20))
        history = np.concatenate([history, action, seen])
  return samples


@pytest.mark.parametrize("packs", [1, 4])
@pytest.mark.parametrize("prompt, turns", [(100, 6), (400, 3), (30, 1)])
def test_packs_are_full_and_of_equal_cost(prompt, turns, packs):
  rng = np.random.default_rng(9)
  samples = _episodes(rng, prompt=prompt, turns=turns, groups=16 // turns)
  config = pack.PackConfig(
    tokens=1024, edges=1024, rows=1024, block=16, packs=packs, buckets=16
  )
  _, stats = pack.pack(samples, config, vocab_size=VOCAB, cost=COST)
  assert stats.fill >= 0.9
  assert stats.balance >= 0.93
  assert stats.packs == packs * stats.batches


def test_unrelated_samples_fill_packs():
  rng = np.random.default_rng(10)
  samples = [
    sample(f"s{i}", rng.integers(0, VOCAB, n), [1, 2], rng=rng)
    for i, n in enumerate(rng.integers(20, 300, 64))
  ]
  config = pack.PackConfig(tokens=1024, edges=1024, rows=1024, block=64)
  for share in (True, False):
    _, stats = pack.pack(samples, config, vocab_size=VOCAB, share=share)
    assert stats.fill >= 0.97
    assert stats.packs == -(-stats.packed_tokens // 1024)


def test_a_tree_is_cut_where_little_is_replayed():
  rng = np.random.default_rng(11)
  samples = _episodes(rng, prompt=50, turns=5, rollouts=4, groups=4)
  config = pack.PackConfig(tokens=1024, edges=1024, rows=1024, block=64)
  _, stats = pack.pack(samples, config, vocab_size=VOCAB)
  # Four trees of 700 tokens or so: a cut inside one costs its prompt alone.
  replays = -(-stats.unique_tokens // 1024) - 1
  assert 0 < stats.packed_tokens - stats.unique_tokens <= 50 * (replays + 1)


def test_the_last_batch_is_spread_over_its_packs():
  rng = np.random.default_rng(12)
  samples = _episodes(rng, prompt=20, turns=4, rollouts=8, groups=1)
  config = pack.PackConfig(tokens=1024, edges=1024, rows=1024, block=32)
  [whole], _ = pack.pack(samples, config, vocab_size=VOCAB, cost=COST)
  config = dataclasses.replace(config, packs=4)
  [batch], stats = pack.pack(samples, config, vocab_size=VOCAB, cost=COST)
  assert whole.tokens_BT.shape == (1, 1024)
  assert batch.tokens_BT.shape == (4, 256)
  assert stats.packs == 4 and stats.balance > 0.9


def test_plain_packing_shares_nothing():
  rng = np.random.default_rng(13)
  samples = _episodes(rng, prompt=20, turns=2, rollouts=3, groups=2)
  config = pack.PackConfig(tokens=256, edges=256, rows=256, block=32)
  batches, plain = pack.pack(samples, config, vocab_size=VOCAB, share=False)
  _, merged = pack.pack(samples, config, vocab_size=VOCAB)
  assert _recovered(batches) == _original(samples)
  for b in batches:
    assert b.samples_BT.max() == 1
  for name in ("samples", "rows", "request_tokens", "request_pairs"):
    assert getattr(plain, name) == getattr(merged, name)
  assert plain.packed_tokens == plain.request_tokens > merged.packed_tokens
  assert plain.packed_pairs == plain.request_pairs
  assert plain.merge_ratio == plain.flop_bound(COST) == 1 < merged.merge_ratio
  assert plain.replay == 0


def test_edges_are_distinct_and_shared_by_equal_samples():
  rng = np.random.default_rng(0)
  samples = [sample(f"s{i}", [1, 2], [3, 4], rng=rng) for i in range(5)]
  config = dataclasses.replace(CONFIG, packs=1)
  (batch,), stats = pack.pack(samples, config, vocab_size=VOCAB)
  assert (stats.edges, stats.rows, stats.packs) == (2, 10, 1)
  # Tokens 1 2 3 predict 3 and 4; token 4 itself predicts nothing.
  assert stats.packed_tokens == 3 and stats.request_tokens == 15
  assert stats.packed_pairs == 6 and stats.request_pairs == 30
  assert batch.tokens_BT[0, :3].tolist() == [1, 2, 3]
  assert batch.samples_BT[0].tolist() == [5, 5, 5] + [0] * 13
  assert batch.version_BM[0, 10:].tolist() == [-1] * 2


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
  config = dataclasses.replace(CONFIG, packs=1, buckets=1, **{name: limit})
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
  for field in dataclasses.fields(a):
    assert getattr(total, field.name) == 2 * getattr(a, field.name) != 0
  for name in ("merge_ratio", "pair_ratio", "fill", "replay", "balance"):
    assert getattr(total, name) == pytest.approx(getattr(a, name))
  assert total.achieved(COST) == pytest.approx(a.achieved(COST))
  nothing = pack.PackStats()
  assert nothing.fill == nothing.replay == nothing.merge_ratio == 0
  assert nothing.balance == nothing.flop_bound(COST) == 1


def test_figures_of_two_turns_by_hand():
  rng = np.random.default_rng(14)
  first = sample("0", [1, 2, 3], [4, 5], rng=rng)
  second = sample("1", [1, 2, 3, 4, 5, 6], [7, 8], rng=rng)
  config = pack.PackConfig(tokens=16, edges=16, rows=16, block=4, packs=1)
  _, stats = pack.pack([first, second], config, vocab_size=VOCAB, cost=COST)
  # Inputs 1 2 3 4 and 1 2 3 4 5 6 7: the second holds the first.
  assert (stats.request_tokens, stats.unique_tokens) == (4 + 7, 7)
  assert (stats.request_pairs, stats.unique_pairs) == (10 + 28, 28)
  assert (stats.rows, stats.unique_edges, stats.edges) == (4, 4, 4)
  # Two blocks of 4 tokens; the last token of the second is padding.
  assert (stats.padded_tokens, stats.executed_pairs) == (8, 3 * 16)
  assert (stats.padded_edges, stats.batches) == (4, 1)
  forest = 100 * 7 + 3 * 28 + 40 * 4
  assert stats.flop_bound(COST) == (100 * 11 + 3 * 38 + 40 * 4) / forest
  assert stats.achieved(COST) == forest / (100 * 8 + 3 * 48 + 40 * 4)
  assert stats.pack_cost == stats.slowest_cost == forest


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
  with pytest.raises(errors.ConfigError, match="buckets=0"):
    pack.PackConfig(buckets=0)
