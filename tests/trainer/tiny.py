"""A tiny decoder and random samples, shared by the trainer's tests."""

from flax import nnx
import numpy as np

from experiments.toys import decoder as toys
from forge_jax import types
from forge_jax.model import decoder as decoder_lib

MODEL = toys.config(64)


def decoder(seed: int = 0) -> decoder_lib.Decoder:
  return decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=seed))


def samples(seed: int = 0, groups: int = 2, members: int = 3):
  """Two-turn episodes of groups that share prompts."""
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(0, 64, n).astype(np.int32)
  system, result = ids(20), []
  for g in range(groups):
    question = np.concatenate([system, ids(9)])
    for m in range(members):
      history = question
      for turn in range(2):
        response = ids(int(rng.integers(3, 8)))
        size = len(response)
        result.append(
          types.Sample(
            name=f"{g}-{m}/{turn}",
            prompt_ids=history,
            response_ids=response,
            logprobs=rng.normal(-4.2, 0.2, size).astype(np.float32),
            advantages=np.full(size, rng.normal(), np.float32),
            weights=np.full(size, 0.01, np.float32),
            versions=np.zeros(size, np.int32),
          )
        )
        history = np.concatenate([history, response, ids(5)])
  return result
