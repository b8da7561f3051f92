"""The device side of the engine: weights, caches, one jitted function.

Invariants:
  - A slot's cache row holds keys and values by position; positions at or past
    the slot's committed length are garbage that no query can see.
  - Prefill and decode are one function, `extend`, at bucketed shapes [R, C]:
    R rows (slots), C new tokens each. After `warm_up` nothing compiles.
  - Caches are donated: one buffer a layer, updated in place.
  - A row's result does not depend on the other rows. On a CPU it is the same
    to the last bit where every step has at least 64 tokens (R * C >= 64).
"""

from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import errors
from forge_jax.engine import sampling as sampling_lib
from forge_jax.model import decoder as decoder_lib


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
  """Sizes of the engine's device state and of its compiled shapes."""

  slots: int = 64  # sequences whose cache is kept
  context: int = 512  # most tokens of a sequence, prompt and response
  decode_rows: tuple[int, ...] = (1, 8, 64)  # buckets of a decode step's rows
  prefill_rows: tuple[int, ...] = (4, 16)  # buckets of a prefill step's rows
  prefill_chunk: int = 16  # prompt tokens of one row in a prefill step

  def __post_init__(self):
    for name in ("decode_rows", "prefill_rows"):
      rows = getattr(self, name)
      if not rows or list(rows) != sorted(set(rows)) or rows[0] < 1:
        raise errors.ConfigError(
          f"{name}={rows} must be positive, ascending and distinct"
        )
    if self.decode_rows[-1] != self.slots:
      raise errors.ConfigError(
        f"the last of decode_rows={self.decode_rows} must be slots={self.slots}"
      )
    if self.prefill_rows[-1] > self.slots:
      raise errors.ConfigError(
        f"prefill_rows={self.prefill_rows} exceed slots={self.slots}"
      )


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One slot's part of a step."""

  slot: int
  tokens: Sequence[int]  # new tokens, at most C
  start: int  # position of the first of them
  seed: int
  temperature: float
  top_k: int
  top_p: float
  min_p: float = 0.0
  shape: sampling_lib.Shape | None = None  # None: the logits as they are


class Runner:
  """Runs steps on the device; knows nothing of requests."""

  def __init__(self, decoder: decoder_lib.Decoder, config: RunnerConfig):
    """Takes a decoder whose state is the first weights.

    Args:
      decoder: graph and weights; its compute dtype is the cache's.
      config: sizes; `context` must not exceed the model's.

    Raises:
      ConfigError: the context is longer than the model's.
    """
    self.config = config
    self.model = decoder.config
    self.dtype = decoder.dtype
    if config.context > self.model.max_context:
      raise errors.ConfigError(
        f"engine context {config.context} exceeds the model's "
        f"{self.model.max_context}"
      )
    self._stacked_graph, state = nnx.split(decoder)
    self._graph = nnx.graphdef(
      nnx.eval_shape(lambda: decoder_lib.UnrolledDecoder(decoder))
    )
    shape = (
      config.slots,
      self.model.num_kv_heads,
      config.context,
      self.model.head_dim,
    )
    self._caches = [
      (jnp.zeros(shape, decoder.dtype), jnp.zeros(shape, decoder.dtype))
      for _ in range(self.model.num_layers)
    ]
    self.compilations = 0  # traces of `extend` and `copy`, for tests
    self._extend = jax.jit(
      self._extend_fn,
      static_argnames=("filtered", "shaped"),
      donate_argnums=(1,),
    )
    self._sample = jax.jit(
      self._sample_fn, static_argnames=("filtered", "tops")
    )
    self._copy = jax.jit(self._copy_fn, donate_argnums=(0,))
    self._prepare = jax.jit(self._prepare_fn)
    self.set_weights(self.prepare(state))

  def prepare(self, state: nnx.State) -> nnx.State:
    """A copy of a decoder's state in the form that `set_weights` takes.

    May be called from any thread; the state may be donated elsewhere after.
    """
    return self._prepare(state)

  def set_weights(self, weights: nnx.State) -> None:
    """Takes prepared weights; caches are kept."""
    self._weights = weights

  def extend(self, rows: Sequence[Row], width: int) -> sampling_lib.Sampled:
    """Appends tokens to slots and samples the token after each row's last.

    Args:
      rows: distinct slots, at most the largest bucket for the width.
      width: C, 1 or the prefill chunk.

    Returns:
      What was sampled; its rows align with `rows`.
    """
    bucket = next(b for b in self._buckets(width) if b >= len(rows))
    full = bucket == self.config.slots
    slot_R = np.arange(bucket, dtype=np.int32)
    place = [row.slot if full else i for i, row in enumerate(rows)]
    if not full:
      used = {row.slot for row in rows}
      spare = (s for s in range(self.config.slots) if s not in used)
      slot_R[:] = [row.slot for row in rows] + [
        next(spare) for _ in range(bucket - len(rows))
      ]
    tokens_RC = np.zeros((bucket, width), np.int32)
    length_R = np.zeros(bucket, np.int32)
    start_R, top_k_R = np.zeros_like(length_R), np.zeros_like(length_R)
    seed_R = np.zeros(bucket, np.uint32)
    temperature_R, top_p_R, min_p_R = np.zeros((3, bucket), np.float32)
    for i, row in zip(place, rows, strict=True):
      tokens_RC[i, : len(row.tokens)] = row.tokens
      length_R[i], start_R[i] = len(row.tokens), row.start
      seed_R[i], temperature_R[i] = row.seed, row.temperature
      top_k_R[i], top_p_R[i], min_p_R[i] = row.top_k, row.top_p, row.min_p
    filtered = any(row.top_k > 0 or row.top_p < 1 or row.min_p for row in rows)
    shaped = any(row.shape is not None for row in rows)
    sampling = (seed_R, temperature_R, top_k_R, top_p_R, min_p_R)
    result, self._caches = self._extend(
      self._weights,
      self._caches,
      slot_R,
      tokens_RC,
      start_R,
      length_R,
      sampling,
      filtered=filtered and not shaped,
      shaped=shaped,
    )
    if shaped:
      shapes: list[sampling_lib.Shape | None] = [None] * bucket
      for i, row in zip(place, rows, strict=True):
        shapes[i] = row.shape
      result = self._sample(
        result,
        sampling_lib.stack(shapes, self.model.vocab_size),
        (seed_R, start_R + length_R, *sampling[1:]),
        filtered=filtered,
        tops=any(shape is not None and shape.tops for shape in shapes),
      )
    return sampling_lib.Sampled(*(np.asarray(x)[place] for x in result))

  def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies whole cache rows, in order; pairs of (source, target) slots."""
    slots = self.config.slots
    for first in range(0, len(pairs), slots):
      some = pairs[first : first + slots]
      source, target = np.zeros((2, slots), np.int32)
      source[: len(some)] = [pair[0] for pair in some]
      target[: len(some)] = [pair[1] for pair in some]
      self._caches = self._copy(self._caches, source, target, len(some))

  def warm_up(self) -> None:
    """Compiles every shape of a plain step, without filters, and `copy`."""
    row = Row(0, (0,), 0, 0, 1.0, 0, 1.0)
    for width in {1, self.config.prefill_chunk}:
      for bucket in self._buckets(width):
        rows = [dataclasses.replace(row, slot=slot) for slot in range(bucket)]
        self.extend(rows, width)
    self.copy([(0, 0)])

  def _buckets(self, width: int) -> tuple[int, ...]:
    if width > 1:
      return self.config.prefill_rows
    return self.config.decode_rows

  def _prepare_fn(self, state: nnx.State) -> nnx.State:
    """Stacked weights as the unrolled forward pass wants them."""
    stacked = nnx.merge(self._stacked_graph, state)
    unrolled = nnx.state(decoder_lib.UnrolledDecoder(stacked))
    return jax.tree.map(jnp.copy, unrolled)

  def _copy_fn(self, caches, source, target, count):
    self.compilations += 1

    def one(i, caches):
      # In order: a pair may read what an earlier one wrote.
      return jax.tree.map(
        lambda cache: jax.lax.dynamic_update_index_in_dim(
          cache,
          jax.lax.dynamic_index_in_dim(cache, source[i], 0, keepdims=False),
          target[i],
          0,
        ),
        caches,
      )

    return jax.lax.fori_loop(0, count, one, caches)

  def _extend_fn(
    self,
    weights,
    caches,
    slot_R,
    tokens_RC,
    start_R,
    length_R,
    sampling,
    *,
    filtered,
    shaped,
  ):
    """Traced: writes the caches, attends over them; samples unless `shaped`."""
    self.compilations += 1
    decoder = nnx.merge(self._graph, weights)
    offset_C = jnp.arange(tokens_RC.shape[1])
    position_RC = start_R[:, None] + offset_C[None]
    write_RC = jnp.where(
      offset_C[None] < length_R[:, None], position_RC, self.config.context
    )
    new_caches = []

    def attend_over(cache):
      def attend(q, k, v):
        updated = tuple(
          _write(buffer, x, slot_R, write_RC)
          for buffer, x in zip(cache, (k, v), strict=True)
        )
        new_caches.append(updated)
        if len(slot_R) < self.config.slots:
          updated = tuple(buffer[slot_R] for buffer in updated)
        return _cached_attention(q, *updated, position_RC)

      return attend

    hidden_RCD = decoder.hidden(
      tokens_RC, position_RC, [attend_over(cache) for cache in caches]
    )
    last_R = jnp.maximum(length_R - 1, 0)
    hidden_RD = jnp.take_along_axis(hidden_RCD, last_R[:, None, None], 1)[:, 0]
    # The head always sees the same number of rows, so that logits do not depend
    # on the size of the step, to the last bit.
    rows = len(slot_R)
    padding = ((0, self.config.slots - rows), (0, 0))
    logits_RV = decoder.logits(jnp.pad(hidden_RD, padding))[:rows]
    if shaped:
      return logits_RV, new_caches
    seed_R, *rest = sampling
    sampled = sampling_lib.sample(
      logits_RV, seed_R, start_R + length_R, *rest, filtered=filtered
    )
    return sampled, new_caches

  def _sample_fn(self, logits_RV, shapes, row_args, *, filtered, tops):
    self.compilations += 1
    return sampling_lib.sample_shaped(
      logits_RV, shapes, *row_args, filtered=filtered, tops=tops
    )


def _write(
  cache_SKWC: jnp.ndarray,
  x_RCKC: jnp.ndarray,
  slot_R: jnp.ndarray,
  write_RC: jnp.ndarray,
) -> jnp.ndarray:
  """Puts new keys or values at (slot, position); past the end is dropped."""
  return cache_SKWC.at[slot_R[:, None], :, write_RC].set(
    x_RCKC.astype(cache_SKWC.dtype), mode="drop"
  )


def _cached_attention(
  q: jnp.ndarray,
  k_RKWC: jnp.ndarray,
  v_RKWC: jnp.ndarray,
  position_RC: jnp.ndarray,
) -> jnp.ndarray:
  """Attention of new tokens [R, C, H, ch] over cache rows [R, K, W, ch]."""
  rows, width, _, channels = q.shape
  kv_heads, context = k_RKWC.shape[1:3]
  q = q.reshape(rows, width, kv_heads, -1, channels).swapaxes(1, 2)
  scores = jnp.einsum(
    "rktgc,rkwc->rktgw", q, k_RKWC, preferred_element_type=jnp.float32
  ) * (channels**-0.5)
  visible = jnp.arange(context)[None, None] <= position_RC[:, :, None]
  scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1).astype(v_RKWC.dtype)
  o = jnp.einsum("rktgw,rkwc->rktgc", probs, v_RKWC)
  return o.swapaxes(1, 2).reshape(rows, width, -1, channels)
