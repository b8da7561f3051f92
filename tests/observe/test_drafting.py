from forge_jax.engine import speculation
from forge_jax.observe import drafting, names


def test_figures_of_steps_with_and_without_drafts():
  made = speculation.Speculation((4,), 2)
  made.record([0, 0], [[1, 1]] * 2, 2.0)
  before = made.stats()
  assert set(before) == set(drafting.TOTALS)
  made.record([2, 2], [[3, 1], [2, 2]], 3.0)
  made.record([0, 0], [[1, 1]], 1.0)
  grown = {name: x - before[name] for name, x in made.stats().items()}
  assert drafting.values(grown) == {
    names.SPECULATION_LENGTH: 2.0,  # 8 tokens of 4 rows
    names.SPECULATION_ACCEPTED: 0.5,
    names.SPECULATION_DRAFTS: 8 / 6,
    names.SPECULATION_SPEEDUP: (4.0 + 1.0) / 4.0,
  }


def test_without_drafts_there_is_less_to_say():
  made = speculation.Speculation((4,), 2)
  made.record([0, 0], [[1, 1]], 1.0)
  assert drafting.values(made.stats()) == {
    names.SPECULATION_DRAFTS: 0.0,
    names.SPECULATION_SPEEDUP: 1.0,
  }
  assert drafting.values(dict.fromkeys(drafting.TOTALS, 0)) == {}
