"""Compiles for GPUs that are not there; prints what came out as JSON lines.

Run by test_compile_gpu.py in a process of its own, because JAX looks for its
plugins once. By hand, with the package jax-cuda13-pjrt on PYTHONPATH:

  python tests/gpu_compile.py CASE...

with a CASE of words, tree attention or paged attention of D decoding rows of a
few tokens F each and B blocks of W, over a table of N pages:

  tree GPU T H K C BLOCK DTYPE
  paged GPU H K C PAGE N D F B W DTYPE

GPU is one of h100, h200, a100; several cases may follow one another. XLA
compiles the kernels down to machine code, as it would beside the GPU. Of each
kernel this reads, from XLA's dump, the threads and the shared memory.
"""

import json
import os
import pathlib
import re
import sys
import tempfile

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from forge_jax import types
from forge_jax.engine import attention
from forge_jax.tree import layout
from forge_jax.tree.attention import pallas_gpu

PAGES = 4096  # of a paged cache
# Kind, compute capability, multiprocessors, and bytes of shared memory of a
# multiprocessor and of a block (CUDA programming guide, technical
# specifications).
GPUS = {
  "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 233472, 232448),
  "h200": ("NVIDIA H200", 9, 132, 233472, 232448),
  "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 167936, 166912),
}
TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {1} }}
  core_count: {2}
  shared_memory_per_core: {3}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {4}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  fpus_per_core: 128
  clock_rate_ghz: 1.5
  memory_bandwidth: 2000000000000
  l2_cache_size: 41943040
  device_memory_size: 84929347584
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{0}"
"""


def mesh_of(gpu):
  """A mesh of one GPU, and what makes arrays on it."""
  chip = topologies.get_topology_desc(
    platform="cuda", target_config=TARGET.format(*GPUS[gpu]), topology="1x1x1"
  )
  mesh = topologies.make_mesh(chip, (1,), ("x",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  return mesh, array


def tree(gpu, T, H, K, C, block, dtype):
  """Tree attention forward and backward, lowered for one GPU."""
  T, H, K, C, block = map(int, (T, H, K, C, block))
  mesh, array = mesh_of(gpu)

  def run(q, k, v, do, plan):
    attend = lambda q, k, v: pallas_gpu.attention(q, k, v, plan, block)
    o, pull = jax.vjp(attend, q, k, v)
    return o, pull(do)

  q, k = array((1, T, H, C), dtype), array((1, T, K, C), dtype)
  start = array((1, T // block + 1), jnp.int32)
  pairs = array((1, layout.plan_capacity(T, block)), jnp.int32)
  end = array((1, T), jnp.int32)
  plan = types.TreeLayout(end, start, pairs, start, pairs)
  # Pallas asks the mesh which GPU it lowers for.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(run).lower(q, k, k, q, plan)


def paged(gpu, *words):
  """A layer's paged attention, and what writes its pages, lowered."""
  *sizes, dtype = words
  H, K, C, page, N, D, F, B, W = map(int, sizes)
  mesh, array = mesh_of(gpu)
  kind = attention.choose("gpu")

  def rows(size, width):
    sizes = ((size, width), (size,), (size,), (size, N))
    return attention.Rows(*(array(shape, jnp.int32) for shape in sizes))

  def run(cache, q, k, v, decode, blocks):
    places = [rows.places(page, PAGES) for rows in (decode, blocks)]
    page_T, offset_T = (jnp.concatenate(x) for x in zip(*places, strict=True))
    cache = attention.write(kind, cache, k, v, page_T, offset_T)
    return attention.attend(kind, q, cache, K, decode, blocks), cache

  T = D * F + B * W
  q, k = array((T, H, C), dtype), array((T, K, C), dtype)
  shapes = attention.cache_shapes(kind, PAGES, page, K, C)
  cache = tuple(array(shape, dtype) for shape in shapes)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(run, donate_argnums=0).lower(
      cache, q, k, k, rows(D, F), rows(B, W)
    )


CASES = {"tree": (tree, 8), "paged": (paged, 12)}  # and their numbers of words


def kernels(dump):
  """Threads and shared memory of the kernels of the program dumped last."""
  *_, path = sorted(dump.glob("*.thunk_sequence.txt"))
  found = re.findall(
    r" _(\w+)_kernel grid: .* threads: \[(\d+).* shared_memory: (\d+)",
    path.read_text(),
  )
  return {
    name: {"threads": int(threads), "shared_bytes": int(shared)}
    for name, threads, shared in found
  }


def compile_strictly(lowered):
  """The program, and whether a kernel of it lacks registers.

  XLA can be told to refuse such a program; then it is compiled as usual.
  """
  strict = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
  try:
    return lowered.compile(compiler_options=strict), False
  except jax.errors.JaxRuntimeError as error:
    if "register spilling" not in str(error):
      raise
  return lowered.compile(), True


def main(words, dump):
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # needs no CUDA to run
  os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump}"
  # An executable for an absent device cannot be read back from the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  while words:
    lower, size = CASES[words[0]]
    case, words = words[:size], words[size:]
    program, spills = compile_strictly(lower(*case[1:]))
    memory = program.memory_analysis()
    figures = {
      "case": case,
      "temp_bytes": memory.temp_size_in_bytes,
      "argument_bytes": memory.argument_size_in_bytes,
      "alias_bytes": memory.alias_size_in_bytes,
      "kernels": kernels(dump),
      "spills": spills,
    }
    for path in dump.iterdir():
      path.unlink()
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as directory:
    main(sys.argv[1:], pathlib.Path(directory))
