"""The device side of the engine: weights, pages, one jitted function.

Invariants:
  - A page holds keys and values by position of its sequence; positions at or
    past the committed length are garbage that no query can see. Page 0 belongs
    to no sequence: padding reads it.
  - Prefill and decode are one function, at bucketed shapes (D, B): D sequences
    go on by one token, B blocks of prompt tokens are added. After `warm_up`
    nothing compiles.
  - Pages are donated: one set of buffers a layer, updated in place.
  - A row's result does not depend on the other rows but for rounding. On a CPU
    it is the same to the last bit where `least_tokens` is 64 or more and a step
    has room for four blocks at least: the products then go the same way.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import errors
from forge_jax.engine import attention, prefix_cache
from forge_jax.engine import config as config_lib
from forge_jax.engine import sampling as sampling_lib
from forge_jax.model import decoder as decoder_lib

_MOVES = 8  # pages moved by one call


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One sequence's part of a step: one token, or a block of them."""

  pages: Sequence[int]  # of the sequence, up to these tokens
  tokens: Sequence[int]  # new tokens
  start: int  # position of the first of them
  seed: int
  temperature: float
  top_k: int
  top_p: float
  min_p: float = 0.0
  shape: sampling_lib.Shape | None = None  # None: the logits as they are


class _Draw(NamedTuple):
  """How the rows' tokens are drawn; see `sampling.sample`."""

  seed_R: np.ndarray
  temperature_R: np.ndarray
  top_k_R: np.ndarray
  top_p_R: np.ndarray
  min_p_R: np.ndarray


class Runner:
  """Runs steps on the device; knows nothing of requests."""

  def __init__(
    self, decoder: decoder_lib.Decoder, config: config_lib.EngineConfig
  ):
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
    self._kind = attention.choose(jax.default_backend(), config.attention)
    self._stacked_graph, state = nnx.split(decoder)
    graph, abstract = nnx.split(
      nnx.eval_shape(lambda: decoder_lib.UnrolledDecoder(decoder))
    )
    self._graph, self._structure = graph, jax.tree.structure(abstract)
    self._allocate()
    self.compilations = 0  # traces of the functions below, for tests
    self._run = jax.jit(
      self._run_fn, static_argnames=("filtered", "shaped"), donate_argnums=(1,)
    )
    self._sample = jax.jit(
      self._sample_fn, static_argnames=("filtered", "tops")
    )
    self._copy = jax.jit(self._copy_fn, donate_argnums=(0,))
    self._save = jax.jit(self._save_fn)
    self._load = jax.jit(self._load_fn, donate_argnums=(0,))
    self._prepare = jax.jit(self._prepare_fn)
    self.set_weights(self.prepare(state))

  def prepare(self, state: nnx.State) -> list[jax.Array]:
    """A copy of a decoder's state in the form that `set_weights` takes.

    May be called from any thread; the state may be donated elsewhere after.
    """
    return self._prepare(state)

  def set_weights(self, weights: list[jax.Array]) -> None:
    """Takes prepared weights; pages are kept."""
    self._weights = weights

  def run(
    self, decode: Sequence[Row], blocks: Sequence[Row], decode_steps: int = 1
  ) -> list[sampling_lib.Sampled]:
    """Adds tokens to sequences and samples the token after each row's last.

    Args:
      decode: rows of one token each, at most the largest bucket.
      blocks: rows of at most `prefill_chunk` tokens; several may be of one
        sequence.
      decode_steps: how often each of `decode` goes on by a token, without
        blocks and shapes if more than once. The pages must suffice.

    Returns:
      What was sampled in each step: of `decode`, then of `blocks`.
    """
    size_D, size_B = self._bucket(len(decode), len(blocks))
    width = self.config.prefill_chunk
    rows_D, rows_B = (
      self._rows(decode, size_D, 1),
      self._rows(blocks, size_B, width),
    )
    place = [*range(len(decode)), *range(size_D, size_D + len(blocks))]
    rows = [*decode, *blocks]
    draw = _draw(rows, place, size_D + size_B)
    filtered = any(row.top_k > 0 or row.top_p < 1 or row.min_p for row in rows)
    shaped = any(row.shape is not None for row in rows)
    results = []
    for _ in range(decode_steps):
      result, self._caches = self._run(
        self._weights,
        self._caches,
        rows_D,
        rows_B,
        draw,
        filtered=filtered and not shaped,
        shaped=shaped,
      )
      if shaped:
        result = self._shape(result, rows, place, rows_D, rows_B, draw)
      results.append(result)
      # The next step takes its tokens without waiting for them.
      rows_D = rows_D._replace(
        token_RW=result[0][:size_D, None] if size_B else result[0][:, None],
        start_R=rows_D.start_R + 1,
      )
    return [
      sampling_lib.Sampled(*(np.asarray(x)[place] for x in result))
      for result in results
    ]

  def move(self, moves: Sequence[prefix_cache.Move]) -> None:
    """Copies pages, in order, on the device and from and to the host."""
    while moves:
      kind = moves[0].kind
      some = []
      for move in moves[:_MOVES]:
        if move.kind != kind:
          break
        some.append(move)
      moves = moves[len(some) :]
      source, target = np.zeros((2, _MOVES), np.int32)
      source[: len(some)] = [move.source for move in some]
      target[: len(some)] = [move.target for move in some]
      if kind == "copy":
        self._caches = self._copy(self._caches, source, target)
      elif kind == "save":
        saved = self._save(self._caches, source)
        for host, x in zip(self._host, saved, strict=True):
          host[target[: len(some)]] = np.asarray(x)[: len(some)]
      else:
        loaded = [host[source] for host in self._host]
        self._caches = self._load(self._caches, loaded, target)

  def warm_up(self) -> None:
    """Compiles every shape of a plain step, without filters, and moves."""
    row = Row((0,), (0,), 0, 0, 1.0, 0, 1.0)
    for size_D, size_B in self.config.shapes():
      self.run([row] * size_D, [row] * size_B)
    kinds = ["copy", "save", "load"] if self.config.host_pages else ["copy"]
    self.move([prefix_cache.Move(kind, 0, 0) for kind in kinds])

  def _allocate(self) -> None:
    config, model = self.config, self.model
    shapes = attention.cache_shapes(
      self._kind,
      config.pages,
      config.page,
      model.num_kv_heads,
      model.head_dim,
    )
    self._caches = [
      tuple(jnp.zeros(shape, self.dtype) for shape in shapes)
      for _ in range(model.num_layers)
    ]
    self._host = [
      np.zeros((config.host_pages, *shape[1:]), self.dtype)
      for _ in range(model.num_layers)
      for shape in shapes
    ]

  def _bucket(self, decode: int, blocks: int) -> tuple[int, int]:
    """The smallest compiled shape that holds as many rows."""
    fits = (
      (size_D, size_B)
      for size_D, size_B in self.config.shapes()
      if size_D >= decode and size_B >= blocks
    )
    return min(fits, key=lambda s: s[0] + s[1] * self.config.prefill_chunk)

  def _rows(self, rows: Sequence[Row], size: int, width: int) -> attention.Rows:
    """Arrays of a bucket's size; padding has no tokens."""
    # Room for a block's padding past the context.
    table = np.zeros(
      (size, self.config.sequence_pages + -(-width // self.config.page)),
      np.int32,
    )
    token = np.zeros((size, width), np.int32)
    start, length = np.zeros((2, size), np.int32)
    for i, row in enumerate(rows):
      token[i, : len(row.tokens)] = row.tokens
      start[i], length[i] = row.start, len(row.tokens)
      table[i, : len(row.pages)] = row.pages
    return attention.Rows(token, start, length, table)

  def _shape(self, logits_RV, rows, place, rows_D, rows_B, draw):
    """Samples from logits that some rows edit."""
    shapes: list[sampling_lib.Shape | None] = [None] * len(draw.seed_R)
    for i, row in zip(place, rows, strict=True):
      shapes[i] = row.shape
    position_R = np.concatenate(
      [r.start_R + r.length_R for r in (rows_D, rows_B)]
    )
    return self._sample(
      logits_RV,
      sampling_lib.stack(shapes, self.model.vocab_size),
      (draw.seed_R, position_R, *draw[1:]),
      filtered=any(r.top_k > 0 or r.top_p < 1 or r.min_p for r in rows),
      tops=any(shape is not None and shape.tops for shape in shapes),
    )

  def _prepare_fn(self, state: nnx.State) -> list[jax.Array]:
    """Stacked weights as the unrolled forward pass wants them."""
    stacked = nnx.merge(self._stacked_graph, state)
    unrolled = nnx.state(decoder_lib.UnrolledDecoder(stacked))
    return [jnp.copy(x) for x in jax.tree.leaves(unrolled)]

  def _copy_fn(self, caches, source, target):
    self.compilations += 1

    def one(i, caches):
      # In order: a move may read what an earlier one wrote. Those past the
      # moves' end copy page 0 onto itself.
      return jax.tree.map(
        lambda x: jax.lax.dynamic_update_index_in_dim(
          x, x[source[i]], target[i], 0
        ),
        caches,
      )

    return jax.lax.fori_loop(0, _MOVES, one, caches)

  def _save_fn(self, caches, source):
    self.compilations += 1
    return [x[source] for x in jax.tree.leaves(caches)]

  def _load_fn(self, caches, loaded, target):
    self.compilations += 1
    leaves, structure = jax.tree.flatten(caches)
    new = [
      x.at[target].set(pages) for x, pages in zip(leaves, loaded, strict=True)
    ]
    return jax.tree.unflatten(structure, new)

  def _run_fn(self, weights, caches, rows_D, rows_B, draw, *, filtered, shaped):
    """Traced: writes the pages, attends over them; samples unless `shaped`."""
    self.compilations += 1
    config, kind = self.config, self._kind
    state = jax.tree.unflatten(self._structure, weights)
    decoder = nnx.merge(self._graph, state)
    both = (rows_D, rows_B)
    join = lambda parts: jnp.concatenate([p.reshape(-1) for p in parts])
    token_T = join([rows.token_RW for rows in both])
    position_T = join([rows.position_RW for rows in both])
    padding = max(config.least_tokens - len(token_T), 0)
    token_T, position_T = (
      jnp.pad(x, (0, padding)) for x in (token_T, position_T)
    )
    places = [rows.places(config.page, config.pages) for rows in both]
    page_T = jnp.pad(
      join([p for p, _ in places]), (0, padding), constant_values=config.pages
    )
    offset_T = jnp.pad(join([o for _, o in places]), (0, padding))
    new_caches = []

    def attend_over(cache):
      def attend(q, k, v):
        cache_now = attention.write(kind, cache, k, v, page_T, offset_T)
        new_caches.append(cache_now)
        heads = k.shape[-2]
        return attention.attend(kind, q, cache_now, heads, rows_D, rows_B)

      return attend

    hidden_TD = decoder.hidden(
      token_T, position_T, [attend_over(cache) for cache in caches]
    )
    size_D, (size_B, width) = len(rows_D.start_R), rows_B.token_RW.shape
    last_B = jnp.arange(size_B) * width + jnp.maximum(rows_B.length_R - 1, 0)
    last_R = jnp.concatenate([jnp.arange(size_D), size_D + last_B])
    padding = max(config.least_tokens - len(last_R), 0)
    hidden_RD = jnp.pad(hidden_TD[last_R], ((0, padding), (0, 0)))
    logits_RV = decoder.logits(hidden_RD)
    if shaped:
      return logits_RV[: len(last_R)], new_caches
    end_R = join([rows.start_R + rows.length_R for rows in both])
    seed_R, end_R, *rest = (
      jnp.pad(x, (0, padding)) for x in (draw.seed_R, end_R, *draw[1:])
    )
    sampled = sampling_lib.sample(
      logits_RV, seed_R, end_R, *rest, filtered=filtered
    )
    return tuple(x[: len(last_R)] for x in sampled), new_caches

  def _sample_fn(self, logits_RV, shapes, row_args, *, filtered, tops):
    self.compilations += 1
    return sampling_lib.sample_shaped(
      logits_RV, shapes, *row_args, filtered=filtered, tops=tops
    )


def _draw(rows: Sequence[Row], place: Sequence[int], size: int) -> _Draw:
  seed, top_k = np.zeros(size, np.uint32), np.zeros(size, np.int32)
  temperature, top_p, min_p = np.zeros((3, size), np.float32)
  for i, row in zip(place, rows, strict=True):
    seed[i], top_k[i] = row.seed, row.top_k
    temperature[i], top_p[i], min_p[i] = row.temperature, row.top_p, row.min_p
  return _Draw(seed, temperature, top_k, top_p, min_p)
