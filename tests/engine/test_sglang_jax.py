"""sglang-jax in this process, behind our server; where it is installed.

Its environment is its own (docs/engines.md), so that the test suite skips this;
there, `python -m pytest tests/engine/test_sglang_jax.py` runs it on a CPU.
"""

import asyncio
import dataclasses
import json

import engine_servers
from engine_servers import chunks, joined, request
import jax
import numpy as np
import pytest

from forge_jax import errors, types
from forge_jax.engine import sglang
from forge_jax.model import config as model_config
from forge_jax.model import params as params_lib
from forge_jax.model import published

pytest.importorskip("sgl_jax")
from forge_jax.engine import sglang_jax

MODEL = model_config.ModelConfig(
  vocab_size=256,
  width=128,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=128,
  mlp_width=256,
  max_context=256,
  qk_norm=True,
  norm_eps=1e-6,
)
ARGUMENTS = {
  "device": "cpu",
  "attention_backend": "native",
  "dtype": "float32",
  "max_total_tokens": 2048,
  "max_running_requests": 4,
  "disable_precompile": True,
  "skip_tokenizer_init": True,
  "log_level": "error",
}


def publish(folder, version, model=MODEL):
  rng = np.random.default_rng(version)
  params = {
    name: rng.normal(size=shape, scale=0.05).astype(np.float32)
    for name, shape in params_lib.shapes(model).items()
  }
  published.write(folder / f"v{version}", model, params, version)
  return types.WeightsVersion(version, path=str(folder / f"v{version}"))


async def test_sglang_jax_takes_weights_and_drops_no_request(tmp_path):
  jax.config.update("jax_numpy_rank_promotion", "allow")  # it is not ours
  first = publish(tmp_path, 0)
  engine = sglang_jax.SGLangJaxEngine(
    sglang.SGLangJaxConfig(first.path, ARGUMENTS)
  )
  async with engine_servers.serving(engine) as (_, _, client):
    greedy = {"temperature": 0.0, "max_tokens": 8}
    old = await chunks(client, request("old", **greedy))
    assert joined(old, "versions") == [0] * 8
    running = [
      asyncio.create_task(
        chunks(client, request(f"r{n}", [n + 1] * 9, max_tokens=40))
      )
      for n in range(3)
    ]
    await asyncio.to_thread(client.update_weights, publish(tmp_path, 1))
    for found in await asyncio.gather(*running):
      assert len(joined(found, "token_ids")) == 40
      assert len(set(joined(found, "versions"))) == 1
    new = await chunks(client, request("new", **greedy))
    assert joined(new, "versions") == [1] * 8
    assert joined(new, "token_ids") != joined(old, "token_ids")

    damaged = publish(tmp_path, 2)
    manifest = tmp_path / "v2/manifest.json"
    about = json.loads(manifest.read_text())
    about["files"]["model.safetensors"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(about))
    wide = dataclasses.replace(MODEL, mlp_width=384)
    for bad, message in (
      (damaged, "damaged"),
      (publish(tmp_path, 3, wide), "version 3 are refused"),
      (types.WeightsVersion(9, path=str(tmp_path / "v1")), "holds version 1"),
    ):
      with pytest.raises(errors.EngineError, match=message):
        await asyncio.to_thread(client.update_weights, bad)
    again = await chunks(client, request("again", **greedy))
    assert joined(again, "token_ids") == joined(new, "token_ids")
    with pytest.raises(errors.EngineError, match="top_p"):
      await chunks(client, request("filtered", top_p=0.5))
