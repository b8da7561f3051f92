"""A trainer step on a real decoder: tree against flat, sharded against not."""

import asyncio
import dataclasses
import os
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import pytest

from forge_jax import errors, types
from forge_jax.engine import api, config, engine
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp, sharding
from forge_jax.trainer import update
from forge_jax.tree import pack

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny

PACK = pack.PackConfig(tokens=256, edges=256, rows=256, block=32)
UPDATE = update.UpdateConfig(block=32, head_chunk=64, learning_rate=1e-3)


def updater(config=UPDATE, devices=1, modules=0, **mesh):
  made = sharding.make_mesh(
    sharding.MeshConfig(**mesh), jax.devices()[:devices]
  )
  decoder = tiny.decoder()
  if modules:
    decoder = mtp.grow(decoder, modules, rngs=nnx.Rngs(params=1))
  return update.Updater(decoder, config, made)


def gradient(up, samples, pack_config=PACK, state=None):
  state = up.initial_state() if state is None else state
  total, sums = up.zero_gradient(state), None
  batches, _ = pack.pack(samples, pack_config, vocab_size=64)
  for batch in batches:
    total, new = up.accumulate(state, total, batch, 0)
    sums = new if sums is None else update.merge_sums(sums, new)
  return state, total, sums


def close(a, b, limit):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    scale = np.abs(y).max() + 1e-12
    assert np.abs(np.asarray(x) - np.asarray(y)).max() / scale <= limit


def test_the_merged_tree_gives_the_gradient_of_the_separate_samples():
  samples = tiny.samples()
  _, merged, merged_sums = gradient(updater(), samples)
  up = updater()
  state = up.initial_state()
  separate, loss = up.zero_gradient(state), 0.0
  for sample in samples:
    [batch], _ = pack.pack([sample], PACK, vocab_size=64)
    separate, sums = up.accumulate(state, separate, batch, 0)
    loss += float(sums["loss"])
  close(merged, separate, 1e-5)
  np.testing.assert_allclose(float(merged_sums["loss"]), loss, rtol=1e-5)


@pytest.mark.parametrize("remat", ["elementwise", "layer"])
def test_rematerialisation_changes_no_gradient(remat):
  samples = tiny.samples()
  keep = dataclasses.replace(UPDATE, remat="none")
  _, plain, _ = gradient(updater(keep), samples)
  changed = dataclasses.replace(UPDATE, remat=remat)
  _, other, _ = gradient(updater(changed), samples)
  close(other, plain, 1e-5)


def test_engine_and_trainer_agree_on_logprobs():
  made = engine.JaxEngine(
    tiny.decoder(),
    config.EngineConfig(
      slots=4, context=64, decode_rows=(4,), prefill_rows=(4,)
    ),
  )
  made.start()

  async def sample(i):
    prompt = tuple(range(i, i + 20))
    request = api.GenerateRequest(
      str(i), prompt, api.SamplingParams(max_tokens=12, seed=i)
    )
    chunks = [chunk async for chunk in made.generate(request)]
    ids = [t for c in chunks for t in c.token_ids]
    size = len(ids)
    return types.Sample(
      name=str(i),
      prompt_ids=np.asarray(prompt, np.int32),
      response_ids=np.asarray(ids, np.int32),
      logprobs=np.asarray([x for c in chunks for x in c.logprobs], np.float32),
      advantages=np.ones(size, np.float32),
      weights=np.full(size, 0.1, np.float32),
      versions=np.zeros(size, np.int32),
    )

  async def collect():
    return await asyncio.gather(*(sample(i) for i in range(6)))

  samples = asyncio.run(collect())
  made.stop()
  _, _, sums = gradient(updater(), samples)
  assert float(sums["same_version"]) == 6 * 12
  assert float(sums["mismatch_max"]) <= 1e-4


def test_a_step_moves_log_probabilities_along_the_advantages():
  up = updater()
  [batch], _ = pack.pack(tiny.samples(), PACK, vocab_size=64)
  credit = batch.weight_BM * batch.advantage_BM
  score = lambda state: (up.row_logprobs(state.params, batch)[0] * credit).sum()
  state, total, _ = gradient(up, tiny.samples())
  before = float(score(state))
  state, norm = up.apply(state, total)
  assert float(norm) > 0 and float(score(state)) > before


def test_later_steps_compile_nothing():
  up = updater()
  state = up.initial_state()
  for seed in range(3):
    batches, _ = pack.pack(tiny.samples(seed), PACK, vocab_size=64)
    total = up.zero_gradient(state)
    for batch in [*batches, *batches]:
      total, _ = up.accumulate(state, total, batch, seed)
    state, _ = up.apply(state, total)
  assert up.traces == 1


def test_eight_devices_give_the_step_of_one(tmp_path):
  script = pathlib.Path(__file__).parent / "sharded_step.py"
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
  }
  subprocess.run(
    [sys.executable, str(script), str(tmp_path / "out.npz")],
    env=environment,
    check=True,
  )
  found = np.load(tmp_path / "out.npz")
  up = updater(modules=1)
  state, total, _ = gradient(up, tiny.samples())
  state, norm = up.apply(state, total)
  np.testing.assert_allclose(found["norm"], norm, rtol=1e-5)
  for name, value in decoder_lib.flatten(state.params).items():
    np.testing.assert_allclose(found[name], value, atol=2e-6, err_msg=name)


def test_an_indivisible_mesh_is_refused():
  with pytest.raises(errors.ConfigError, match=r"tensor=2 .*num_kv_heads=1"):
    model = dataclasses.replace(tiny.MODEL, num_kv_heads=1)
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 1), sharding.AXES)
    sharding.check_divisible(model, mesh)
  with pytest.raises(errors.ConfigError, match=r"tensor=3.* needs 3 devices"):
    sharding.make_mesh(sharding.MeshConfig(tensor=3), jax.devices()[:1])


def test_the_choice_of_attention_is_told_once(caplog):
  with caplog.at_level("INFO", logger="forge_jax"):
    up = updater()
    assert up.config.attention == "auto" and up.attention == "xla"
    gradient(up, tiny.samples())
  told = [r.getMessage() for r in caplog.records if "attention" in r.message]
  assert told == ["tree attention: xla (cpu)"]


def test_a_named_attention_is_used():
  named = updater(dataclasses.replace(UPDATE, attention="reference"))
  plain = updater()
  state, got, _ = gradient(named, tiny.samples())
  _, want, _ = gradient(plain, tiny.samples())
  close(got, want, 1e-5)
  whole = dataclasses.replace(PACK, buckets=1)
  [batch], _ = pack.pack(tiny.samples(), whole, vocab_size=64)
  # T * T scores, which only the reference has.
  dense = [
    "256x256x" in up.lower(state, got, batch).as_text() for up in (named, plain)
  ]
  assert dense == [True, False]


def test_an_unknown_attention_is_refused():
  with pytest.raises(errors.ConfigError, match=r"trainer\.attention='fast'"):
    update.UpdateConfig(attention="fast")


def test_an_unknown_rematerialisation_is_refused():
  with pytest.raises(errors.ConfigError, match="everything"):
    update.UpdateConfig(remat="everything")


def test_parameters_are_placed_by_the_first_rule_that_matches():
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  state = nnx.state(tiny.decoder())
  specs = {
    "/".join(str(getattr(k, "key", k)) for k in path[:-1]): leaf.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      sharding.placements(state, mesh)
    )
  }
  P = jax.sharding.PartitionSpec
  assert specs["embed/embedding"] == P("tensor", "fsdp")
  assert specs["layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
  assert specs["final_norm/scale"] == P()
