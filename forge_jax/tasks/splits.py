"""Endless, seeded sequences of tasks with a split that training never sees.

A task is drawn from a random stream of its own, named by (seed, split, index).
Where both splits draw from the same material, a digest of what is asked puts
every question on one side or the other, so that none of `heldout` ever occurs in
`train`, whatever the seeds.
"""

from collections.abc import Callable, Mapping
import hashlib
import random
from typing import Any

from forge_jax import errors, types

SPLITS = ("train", "heldout")
_HELDOUT_SHARE = 8  # one question in so many is kept from training
_MOST_DRAWS = 1000  # until both sides are taken to have too few questions


def is_heldout(question: str) -> bool:
  """Whether a question is kept from training, by a digest of its text."""
  digest = hashlib.sha256(question.encode()).digest()
  return int.from_bytes(digest[:8], "big") % _HELDOUT_SHARE == 0


def draw(
  domain: str,
  split: str,
  index: int,
  seed: int,
  make: Callable[[random.Random], Mapping[str, Any]],
  *,
  disjoint: bool = False,
) -> types.Task:
  """The index-th task of a split.

  Args:
    domain: the domain's name.
    split: "train", which depends on the seed, or "heldout", which does not.
    index: from 0 on.
    seed: the domain's.
    make: draws a payload of JSON values; its "question" tells tasks apart.
    disjoint: `make` never draws a question for both splits anyway.

  Raises:
    ConfigError: there is no such split, the index is negative, or `make` finds
      no question for the split.
  """
  if split not in SPLITS:
    raise errors.ConfigError(
      f"{domain} has no split {split!r}; it has {', '.join(SPLITS)}"
    )
  if index < 0:
    raise errors.ConfigError(f"a task's index is >= 0, not {index}")
  heldout = split == "heldout"
  # A string as a seed is hashed whole, so that streams do not overlap.
  rng = random.Random(f"{domain} {split} {0 if heldout else seed} {index}")
  for _ in range(_MOST_DRAWS):
    payload = make(rng)
    if disjoint or is_heldout(payload["question"]) == heldout:
      return types.Task(f"{domain}/{split}/{index}", domain, index, payload)
  raise errors.ConfigError(
    f"{domain} drew {_MOST_DRAWS} questions and none was for {split!r}"
  )
