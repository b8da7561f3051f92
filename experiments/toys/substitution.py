"""A domain of one-token-a-letter words, to be respelt by a table of its own.

A question is LETTERS letters behind the token that names its domain. The reply
is as many letters: what the table has for each. Two domains differ in their
table and in the first token, and share everything else, a policy's weights too.

Rewards:
  answer  perf +1.0  all letters right
"""

from collections.abc import Sequence
import random
from typing import Any

import numpy as np

from forge_jax import types
from forge_jax.tasks import splits

ALPHABET, LETTERS, DOMAINS = 16, 4, 2
VOCAB = ALPHABET + DOMAINS


class Substitution:
  """The number-th domain of them; letters are the token ids below ALPHABET."""

  max_tokens = LETTERS

  def __init__(self, number: int, seed: int):
    """Draws the table from the number, and training tasks from the seed."""
    self.name = f"table{number}"
    self._opening = ALPHABET + number
    self._seed = seed
    rng = random.Random(self.name)
    self._table = np.array(rng.sample(range(ALPHABET), ALPHABET), np.int32)

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; its payload has question and letters."""
    return splits.draw(self.name, split, index, self._seed, self._draw)

  def prompt(self, task: types.Task) -> np.ndarray:
    """Int32 [1 + LETTERS]."""
    return np.array([self._opening, *task.payload["letters"]], np.int32)

  def truth(self, task: types.Task) -> np.ndarray:
    """The right reply, int32 [LETTERS]."""
    return self._table[task.payload["letters"]]

  def rewards(
    self, task: types.Task, reply: np.ndarray
  ) -> Sequence[types.Reward]:
    """What a reply, int32 [LETTERS], earns."""
    if not np.array_equal(reply, self.truth(task)):
      return ()
    return (types.Reward("answer", types.Component.PERF, 1.0),)

  def _draw(self, rng: random.Random) -> dict[str, Any]:
    letters = [rng.randrange(ALPHABET) for _ in range(LETTERS)]
    return {"question": " ".join(map(str, letters)), "letters": letters}
