"""Tree attention: a token attends to exactly its ancestors and itself.

One signature, several implementations, which the tests hold equal:

  reference    dense, the oracle; memory for T * T scores
  xla          block-sparse, any backend
  pallas_tpu   block-sparse kernels for TPUs
  pallas_gpu   block-sparse kernels for GPUs
"""

import jax

from forge_jax import errors, types
from forge_jax.tree.attention import pallas_gpu, pallas_tpu, reference, xla

# A module a name; each has `attention(q, k, v, layout, block, *, interpret)`.
_MODULES = {
  "reference": reference,
  "xla": xla,
  "pallas_tpu": pallas_tpu,
  "pallas_gpu": pallas_gpu,
}
_FASTEST = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}  # by platform; else xla
NAMES = ("auto", *_MODULES)


def resolve(implementation: str, platform: str) -> str:
  """The implementation that a name stands for on a platform.

  Args:
    implementation: one of `NAMES`; "auto" is the platform's fastest.
    platform: of the devices that compute, as `jax.Device.platform` has it.

  Raises:
    ConfigError: an unknown implementation.
  """
  if implementation not in NAMES:
    raise errors.ConfigError(
      f"unknown tree attention {implementation!r}; expected one of "
      f"{', '.join(NAMES)}"
    )
  if implementation == "auto":
    return _FASTEST.get(platform, "xla")
  return implementation


def tree_attention(
  q_BTHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  layout: types.TreeLayout,
  *,
  block: int,
  implementation: str = "auto",
  interpret: bool = False,
) -> jax.Array:
  """Attention of every token over its ancestors and itself.

  Query t sees key s exactly when s <= t < subtree_end[s]; scores are scaled
  by 1/sqrt(C). Query head h reads key/value head h // (H/K). Scores, softmax
  and output are accumulated in at least float32.

  Args:
    q_BTHC: queries, floating.
    k_BTKC: keys, of q's dtype; K divides H.
    v_BTKC: values, as the keys.
    layout: of the same B and T; see `types.TreeLayout`.
    block: tokens of a block, as the layout was built.
    implementation: one of `NAMES`; "auto" goes by JAX's default backend.
    interpret: run a Pallas kernel's Python instead of compiling it: slow, on
      any device, for tests. The others ignore it.

  Returns:
    o_BTHC, of q's dtype.

  Raises:
    ConfigError: an unknown implementation; heads that K does not divide; a
      layout built for other shapes.
  """
  _check(q_BTHC, k_BTKC, layout, block)
  module = _MODULES[resolve(implementation, jax.default_backend())]
  return module.attention(
    q_BTHC, k_BTKC, v_BTKC, layout, block, interpret=interpret
  )


def _check(q_BTHC, k_BTKC, layout: types.TreeLayout, block: int) -> None:
  heads, kv_heads = q_BTHC.shape[2], k_BTKC.shape[2]
  if heads % kv_heads:
    raise errors.ConfigError(
      f"{kv_heads} key/value heads do not divide {heads} query heads"
    )
  if layout.subtree_end_BT.shape != q_BTHC.shape[:2]:
    raise errors.ConfigError(
      f"a layout of [B, T] = {layout.subtree_end_BT.shape} does not fit "
      f"queries of {q_BTHC.shape[:2]}"
    )
  blocks = layout.query_start.shape[1] - 1
  if blocks * block != q_BTHC.shape[1]:
    raise errors.ConfigError(
      f"a plan of {blocks} blocks of {block} does not cover "
      f"{q_BTHC.shape[1]} tokens"
    )
