"""Weights from disk into a served engine: swapped under load, or refused."""

import asyncio
import json

import engine_servers
from engine_servers import chunks, joined, request
from flax import nnx
import numpy as np
import pytest
import pytest_asyncio
from tiny_engine import MODEL

from forge_jax import errors, types
from forge_jax.engine import config, engine
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import published

CONFIG = config.EngineConfig(
  slots=8, context=128, decode_rows=(8,), prefill_rows=(4,), prefill_chunk=16
)


def params(seed):
  state = nnx.state(decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=seed)))
  flat = decoder_lib.flatten(state)
  return {name: np.array(array) for name, array in flat.items()}


@pytest_asyncio.fixture
async def serving():
  made = engine.JaxEngine(
    decoder_lib.Decoder.from_params(MODEL, params(0)), CONFIG
  )
  made.start()
  try:
    async with engine_servers.serving(made) as (_, _, client):
      yield client
  finally:
    made.stop()


def publish(folder, version):
  published.write(folder / f"v{version}", MODEL, params(version), version)
  return types.WeightsVersion(version, path=str(folder / f"v{version}"))


async def test_no_request_is_dropped_over_many_swaps(serving, tmp_path):
  running, done = True, []

  async def ask(number):
    count = 0
    while running:
      count += 1
      asked = request(
        f"{number}-{count}", [number + 1] * 20, max_tokens=40, seed=count
      )
      done.append(await chunks(serving, asked))

  tasks = [asyncio.create_task(ask(n)) for n in range(6)]
  for version in range(1, 9):
    weights = publish(tmp_path, version)
    await asyncio.to_thread(serving.update_weights, weights)
    # What is asked for now is sampled from these weights.
    now = await chunks(serving, request(f"now-{version}", max_tokens=2))
    assert set(joined(now, "versions")) == {version}
  running = False
  await asyncio.gather(*tasks)
  assert len(done) >= 6
  for found in done:
    assert len(joined(found, "token_ids")) == 40
    versions = joined(found, "versions")
    assert versions == sorted(versions)
    assert found[-1].stop_reason == types.StopReason.LENGTH


async def test_bad_folders_are_refused_and_the_old_weights_serve(
  serving, tmp_path
):
  await asyncio.to_thread(serving.update_weights, publish(tmp_path, 1))
  greedy = {"temperature": 0.0, "max_tokens": 12}
  before = await chunks(serving, request("before", **greedy))

  damaged = publish(tmp_path, 2)
  path = tmp_path / "v2/model.safetensors"
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  half = publish(tmp_path, 3)
  (tmp_path / "v3/manifest.json").unlink()
  wrong = publish(tmp_path, 4)
  manifest = tmp_path / "v4/manifest.json"
  about = json.loads(manifest.read_text())
  about["model"]["num_layers"] = 3
  manifest.write_text(json.dumps(about))
  # A publisher without our check: NaN behind a correct checksum.
  nan = types.WeightsVersion(5, path=str(tmp_path / "v5"))
  bad = params(5)
  bad["final_norm/scale"][3] = np.nan
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(published.params_lib, "check_finite", lambda params: None)
    published.write(tmp_path / "v5", MODEL, bad, 5)

  for weights, message in (
    (damaged, "damaged: SHA-256"),
    (half, "no manifest"),
    (wrong, "another model's weights: num_layers=3"),
    (nan, "final_norm/scale holds NaN"),
    (types.WeightsVersion(9, path="nowhere"), "no manifest"),
    (types.WeightsVersion(9, path=str(tmp_path / "v1")), "holds version 1"),
  ):
    with pytest.raises(errors.EngineError, match=message):
      await asyncio.to_thread(serving.update_weights, weights)
  after = await chunks(serving, request("after", **greedy))
  assert joined(after, "token_ids") == joined(before, "token_ids")
  assert set(joined(after, "versions")) == {1}
