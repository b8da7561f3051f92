"""FLOPs add up."""

from forge_jax.tree import cost


def test_a_total_weighs_tokens_pairs_and_edges():
  assert cost.Cost(2.0, 0.5, 10.0).total(3, 4, 5) == 6 + 2 + 50
  assert cost.PER_TOKEN.total(7, 100, 100) == 7
