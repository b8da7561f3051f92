"""One update on eight forced CPU devices; writes the parameters.

Run by test_update.py in a process of its own, because the number of devices
is fixed when JAX starts.
"""

import sys

import jax
import numpy as np
import test_update
import tiny

from forge_jax.model import decoder as decoder_lib
from forge_jax.tree import pack


def main(path: str) -> None:
  assert jax.device_count() == 8
  up = test_update.updater(devices=8, modules=1, data=2, fsdp=2, tensor=2)
  config = pack.PackConfig(tokens=128, edges=128, rows=128, block=32, packs=4)
  state, total, _ = test_update.gradient(up, tiny.samples(), config)
  state, norm = up.apply(state, total)
  params = decoder_lib.flatten(state.params)
  for name, shape in (
    ("layers/mlp/up/kernel", (2, 16, 24)),
    ("mtp/0/layer/mlp/up/kernel", (16, 24)),
  ):
    assert params[name].addressable_shards[0].data.shape == shape
  np.savez(path, norm=norm, **{k: np.asarray(v) for k, v in params.items()})


if __name__ == "__main__":
  main(sys.argv[1])
