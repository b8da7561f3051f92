"""The built-in engine's controls: weights from disk, refusals, pauses."""

import asyncio

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import MODEL, decoder

from forge_jax import errors, types
from forge_jax.engine import api, config, engine
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import published

CONFIG = config.EngineConfig(
  slots=8, context=64, decode_rows=(8,), prefill_rows=(4,), prefill_chunk=16
)


def numpy_params(made):
  flat = decoder_lib.flatten(nnx.state(made))
  return {name: np.asarray(array) for name, array in flat.items()}


@pytest.fixture
def running():
  made = engine.JaxEngine(decoder(), CONFIG)
  made.start()
  yield made
  made.stop()


async def sample(made, name, **sampling):
  sampling = {"max_tokens": 8, "seed": 3, "temperature": 0.0} | sampling
  request = api.GenerateRequest(
    name, tuple(range(20)), api.SamplingParams(**sampling)
  )
  chunks = [chunk async for chunk in made.generate(request)]
  join = lambda field: [x for c in chunks for x in getattr(c, field)]
  return join("token_ids"), join("versions"), chunks[-1].stop_reason


async def test_weights_come_from_a_folder_as_from_memory(running, tmp_path):
  published.write(tmp_path / "v3", MODEL, numpy_params(decoder(1)), 3)
  old = await sample(running, "old")
  folder = types.WeightsVersion(3, path=str(tmp_path / "v3"))
  running.update_weights(folder)
  from_folder = await sample(running, "folder")
  running.update_weights(types.WeightsVersion(4, params=nnx.state(decoder(1))))
  from_memory = await sample(running, "memory")
  assert from_folder[0] == from_memory[0] != old[0]
  assert (set(old[1]), set(from_folder[1])) == ({0}, {3})


@pytest.mark.parametrize("value", [np.nan, np.inf])
async def test_weights_that_are_no_numbers_are_refused(running, value):
  before = await sample(running, "before")
  bad = decoder(1)
  scale = bad.final_norm.scale
  scale.set_value(scale.get_value().at[5].set(value))
  with pytest.raises(errors.EngineError, match=r"version 9 .* final_norm"):
    running.update_weights(types.WeightsVersion(9, params=nnx.state(bad)))
  after = await sample(running, "after")
  assert after == before and set(after[1]) == {0}


async def test_weights_that_do_not_fit_are_refused(running, tmp_path):
  before = await sample(running, "before")
  wide = decoder_lib.Decoder(
    model_config.ModelConfig(**{**vars(MODEL), "mlp_width": 64}),
    rngs=nnx.Rngs(params=0),
  )
  folder = tmp_path / "v5"
  published.write(folder, MODEL, numpy_params(decoder(1)), 5)
  (folder / "model.safetensors").write_bytes(b"half")
  for bad, message in (
    (types.WeightsVersion(5), "neither arrays nor a path"),
    (types.WeightsVersion(5, params=nnx.state(wide)), "expected shape"),
    (types.WeightsVersion(5, path=str(folder)), "half-written"),
    (types.WeightsVersion(6, path=str(folder)), "holds version 5"),
    (types.WeightsVersion(5, path=str(tmp_path / "v4")), "no manifest"),
  ):
    with pytest.raises(errors.EngineError, match=message):
      running.update_weights(bad)
  assert await sample(running, "after") == before


async def test_a_pause_keeps_requests_and_drops_none(running):
  running.pause()
  running.settle(20.0)
  steps = running.stats()["steps"]
  waiting = [asyncio.create_task(sample(running, str(i))) for i in range(3)]
  await asyncio.sleep(0.1)
  running.settle(20.0)  # the pause holds up sampling, not its controls
  assert running.stats()["steps"] == steps
  new = decoder(1)
  running.update_weights(types.WeightsVersion(1, params=nnx.state(new)))
  running.resume()
  outs = await asyncio.gather(*waiting)
  assert all(len(ids) == 8 and set(v) == {1} for ids, v, _ in outs)
  assert all(reason == types.StopReason.LENGTH for _, _, reason in outs)


def test_a_stopped_engine_does_not_settle():
  made = engine.JaxEngine(decoder(), CONFIG)
  with pytest.raises(errors.EngineUnavailableError, match=r"0\.01 s"):
    made.settle(0.01)


async def test_half_precision_weights_from_a_folder(tmp_path):
  bf16 = decoder_lib.Decoder.from_params(
    MODEL, numpy_params(decoder()), dtype=jnp.bfloat16
  )
  made = engine.JaxEngine(bf16, CONFIG)
  made.start()
  try:
    published.write(tmp_path / "v1", MODEL, numpy_params(decoder()), 1)
    before = await sample(made, "before")
    made.update_weights(types.WeightsVersion(1, path=str(tmp_path / "v1")))
    after = await sample(made, "after")
    assert after[0] == before[0] and set(after[1]) == {1}
  finally:
    made.stop()
