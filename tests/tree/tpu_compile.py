"""Compiles for TPUs that are not there; prints what came out as JSON lines.

Run by test_compile_tpu.py in a process of its own, because the compiler reads
its options when it is loaded. By hand:

  python tests/tree/tpu_compile.py attention TPU T H K C BLOCK DTYPE
  python tests/tree/tpu_compile.py step TPU REMAT

with TPU one of v5p, v5e, v6e; several cases may follow one another. Needs
TPU_LIBRARY_PATH, the path of libtpu.so.

The compiler schedules a kernel's instructions itself: a bundle is what the chip
does in one cycle, as long as memory keeps up. From the compiler's dump this
reads, of each kernel, the bundles of the two parts with most matrix products,
which are one head of a block pair without and with the mask; the share of the
matrix units' cycles that are busy there; and the bytes of vector memory that it
allocates.
"""

import itertools
import json
import os
import pathlib
import re
import sys
import tempfile

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp

from forge_jax import types
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.trainer import update
from forge_jax.tree import layout
from forge_jax.tree.attention import pallas_tpu

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def devices(tpu):
  return topologies.get_topology_desc(
    platform="tpu", topology_name=TOPOLOGIES[tpu]
  ).devices


def layout_like(array, B, T, block):
  start = array((B, T // block + 1), jnp.int32)
  pairs = array((B, layout.plan_capacity(T, block)), jnp.int32)
  return types.TreeLayout(array((B, T), jnp.int32), start, pairs, start, pairs)


def attention(tpu, T, H, K, C, block, dtype):
  """Attention forward and backward on one chip."""
  T, H, K, C, block = map(int, (T, H, K, C, block))
  place = jax.sharding.SingleDeviceSharding(devices(tpu)[0])

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def run(q, k, v, do, plan):
    attend = lambda q, k, v: pallas_tpu.attention(q, k, v, plan, block)
    o, pull = jax.vjp(attend, q, k, v)
    return o, pull(do)

  q, k = array((1, T, H, C), dtype), array((1, T, K, C), dtype)
  plan = layout_like(array, 1, T, block)
  return jax.jit(run).lower(q, k, k, q, plan)


def step(tpu, remat):
  """The trainer's gradient of two packs, model split over four chips."""
  T, rows, block = 1024, 256, 128
  model = model_config.ModelConfig(
    vocab_size=1024,
    width=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=1024,
    max_context=T,
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2), devices(tpu))
  updater = update.Updater(
    decoder_lib.abstract(model, dtype=jnp.bfloat16),
    update.UpdateConfig(block=block, remat=remat),
    mesh,
  )
  params = nnx.state(decoder_lib.abstract(model))
  at = sharding.placements(params, mesh)
  params = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    params,
    at,
  )
  ways = sharding.batch_sharding(mesh)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=ways)

  tokens, ints = array((2, T), jnp.int32), array((2, rows), jnp.int32)
  floats = array((2, rows), jnp.float32)
  batch = types.PackedBatch(
    tokens_BT=tokens,
    position_BT=tokens,
    parent_BT=tokens,
    samples_BT=tokens,
    layout=layout_like(array, 2, T, block),
    edge_parent_BE=ints,
    edge_token_BE=ints,
    row_edge_BM=ints,
    old_logprob_BM=floats,
    advantage_BM=floats,
    weight_BM=floats,
    version_BM=ints,
  )
  assert updater.attention == "pallas_tpu"  # by the mesh's platform
  return updater.lower(update.TrainState(params, None), params, batch)


def schedule(dump):
  """Figures of the kernels compiled since the last call, by kernel."""
  found = {}
  for path in sorted(dump.glob("*tree_attention_*-final_bundles.txt")):
    if "analysis" in path.name:
      continue
    name = re.search(r"tree_attention_([a-z]+)", path.name)[1]
    text = path.read_text()
    # A bundle's line: its number, what begins there, its instructions.
    marks = re.findall(r"(?m)^ *(?:0x)?([0-9a-f]+) +([A-Z]{2})?:[ >]*{", text)
    starts = [int(number, 16) for number, mark in marks if mark]
    stem = path.name.split("-")[0]
    [table] = dump.glob(f"{stem}-*final_hlo-static-per-bundle-utilization.txt")
    rows = re.findall(r"(?m)^ *(\d+)(?: +\d+)+ *$", table.read_text())
    units, *busy = map(int, rows)
    parts = sorted(
      (sum(busy[a:b]), b - a) for a, b in itertools.pairwise(starts)
    )[-2:]
    [memory] = dump.glob(f"{stem}-*pre-finalize-registers-and-allocations.txt")
    sizes = re.findall(
      r"space=vmem, size = (0x[0-9a-f]+), scoped", memory.read_text()
    )
    found[name] = {
      "bundles": [size for _, size in parts],
      "matrix_units_busy": [
        round(work / size / units, 3) for work, size in parts
      ],
      "vector_bytes": sum(int(size, 16) for size in sizes),
    }
  for path in dump.iterdir():
    if path.is_file():
      path.unlink()
  return found


def prepare(dump):
  """What the compiler needs to know before it is loaded."""
  jax.config.update("jax_platforms", "cpu")
  # An executable for an absent device cannot be read back from the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to quarrel over
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_to_filter=.*tree_attention.* "
    "--xla_jf_dump_llo_pass_label_regex=.*final.*",
  }


def main(words, dump):
  prepare(dump)
  while words:
    kind = {"attention": attention, "step": step}[words[0]]
    count = kind.__code__.co_argcount
    case, words = words[: count + 1], words[count + 1 :]
    compiled = kind(*case[1:]).compile()
    memory = compiled.memory_analysis()
    figures = {
      "case": case,
      "temp_bytes": memory.temp_size_in_bytes,
      "argument_bytes": memory.argument_size_in_bytes,
      "code_bytes": memory.generated_code_size_in_bytes,
      "kernels": schedule(dump),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as directory:
    main(sys.argv[1:], pathlib.Path(directory))
