"""The engine benchmark's loads on a tiny model, without their timings."""

from flax import nnx
import pytest

from experiments.benchmarks import engine_load
from experiments.toys import decoder as toys
from forge_jax.engine import config, engine
from forge_jax.model import decoder as decoder_lib

EPISODES = engine_load.Episodes(
  groups=3, rollouts=3, turns=3, system=20, task=20, reply=4, observation=6
)
MODEL = toys.config(97)


def started(**changes):
  decoder = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0))
  sizes = {"slots": 8, "context": 96, "decode_rows": (8,), "prefill_rows": (4,)}
  made = engine.JaxEngine(decoder, config.EngineConfig(**sizes, **changes))
  made.start()
  return made, nnx.state(decoder)


@pytest.mark.parametrize("reuse", [True, False])
def test_what_episodes_share_comes_from_the_cache(reuse):
  made, _ = started(reuse=reuse)
  try:
    _, served = engine_load.agents(made, EPISODES, MODEL.vocab_size)
    stats = made.stats()
  finally:
    made.stop()
  assert stats["sampled_tokens"] == 3 * 3 * 3 * 4
  # Blocks of a prompt that two sequences need at once may be computed twice.
  assert 0.9 <= served <= 1 if reuse else served == 0


def test_a_soak_drops_nothing():
  made, state = started()
  try:
    figures = engine_load.soak(made, state, swaps=6, seconds=0.5, longest=40)
    assert made.version == 6
  finally:
    made.stop()
  assert figures["dropped"] == 0
  assert figures["requests"] > figures["aborted"]
