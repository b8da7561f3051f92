"""Compiles paged attention for a TPU that is not there; prints a JSON line.

Run by test_compile_paged_tpu.py in a process of its own, because the compiler
reads its options when it is loaded. By hand:

  python tests/engine/paged_tpu_compile.py TPU H K C PAGE D F B W

for heads, KV heads, channels, tokens of a page, decoding rows and their width,
blocks and their width; TPU is one of v5p, v5e, v6e. Needs TPU_LIBRARY_PATH, the path of
libtpu.so.
"""

import json
import os
import sys

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from forge_jax.engine import attention

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
PAGES, TABLE = 1024, 64


def devices(tpu):
  """Four chips."""
  jax.config.update("jax_platforms", "cpu")
  # An executable for an absent device cannot be read back from the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to quarrel over
  }
  return topologies.get_topology_desc(
    platform="tpu", topology_name=TOPOLOGIES[tpu]
  ).devices


def main(tpu, *sizes):
  H, K, C, page, D, F, B, W = map(int, sizes)
  device = devices(tpu)[0]
  place = jax.sharding.SingleDeviceSharding(device)

  def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def rows(size, width):
    return attention.Rows(
      array(size, width), array(size), array(size), array(size, TABLE)
    )

  kind = attention.choose("tpu")

  def layer(q, k, v, cache, decode, blocks):
    places = [rows.places(page, PAGES) for rows in (decode, blocks)]
    page_T, offset_T = (jnp.concatenate(x) for x in zip(*places, strict=True))
    cache = attention.write(kind, cache, k, v, page_T, offset_T)
    return attention.attend(kind, q, cache, K, decode, blocks), cache

  T, half = D * F + B * W, jnp.bfloat16
  shapes = attention.cache_shapes(kind, PAGES, page, K, C)
  # The kernel asks which chip it is for.
  mesh = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(device.device_kind, 1, "tpu"),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(layer, donate_argnums=3).lower(
      array(T, H, C, dtype=half),
      array(T, K, C, dtype=half),
      array(T, K, C, dtype=half),
      tuple(array(*shape, dtype=half) for shape in shapes),
      rows(D, F),
      rows(B, W),
    )
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  figures = {
    "kernel": "tpu_custom_call" in compiled.as_text(),
    "temp_bytes": memory.temp_size_in_bytes,
    "alias_bytes": memory.alias_size_in_bytes,
    "cache_bytes": 2 * sum(jnp.prod(jnp.array(s)).item() for s in shapes),
  }
  print(json.dumps(figures))


if __name__ == "__main__":
  main(*sys.argv[1:])
