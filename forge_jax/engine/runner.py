"""The device side of the engine: weights, pages, one jitted function.

Invariants:
  - A page holds keys and values by position of its sequence; positions at or
    past the committed length are garbage that no query can see. Page 0 belongs
    to no sequence: padding reads it.
  - Prefill, decode and the verification of drafts are one function, at bucketed
    shapes (D, W, B): D sequences go on by a token and W - 1 drafts of those
    that follow, B blocks of prompt tokens are added. After `warm_up` nothing
    compiles.
  - Pages are donated: one set of buffers a layer, updated in place.
  - A step is one program of `tensor_parallel` devices. Each has a share of the
    heads, with their pages, of the MLPs and of the vocabulary; what passes
    between layers, and the logits that are sampled from, each has whole.
  - A row's result does not depend on the other rows but for rounding. On a CPU
    it is the same to the last bit where `row_multiple` is 64, or makes all steps
    one size: the products then go the same way.
"""

from collections.abc import Iterator, Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from forge_jax import errors
from forge_jax.engine import attention, drafts, prefix_cache
from forge_jax.engine import batch as batch_lib
from forge_jax.engine import config as config_lib
from forge_jax.engine import pages as pages_lib
from forge_jax.engine import sampling as sampling_lib
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding


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
      ConfigError: the context is longer than the model's, or the model cannot
        be split over so many devices.
    """
    self.config = config
    self.model = decoder.config
    self.dtype = decoder.dtype
    if config.context > self.model.max_context:
      raise errors.ConfigError(
        f"engine context {config.context} exceeds the model's "
        f"{self.model.max_context}"
      )
    ways = config.tensor_parallel
    self._mesh = sharding.make_mesh(
      sharding.MeshConfig(tensor=ways), jax.devices()[:ways]
    )
    sharding.check_divisible(self.model, self._mesh)
    self._kind = attention.choose(jax.default_backend(), config.attention)
    # Modules that draft; others are not taken in.
    self.modules = min(self.model.mtp_modules, config.draft_tokens)
    self._stacked_graph, state = nnx.split(decoder)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: self._unroll(decoder)))
    self._graph, self._structure = graph, jax.tree.structure(abstract)
    self._pages = pages_lib.Pages(
      self.model, config, self._kind, self.dtype, self.modules, self._mesh
    )
    self._compiled = 0  # traces of the functions below
    # Placements are spelled out, so that one step's outputs are the next one's
    # inputs as they are, and nothing is compiled twice.
    weights = jax.tree.leaves(sharding.placements(abstract, self._mesh))
    layers, modules = self._pages.placement
    whole = NamedSharding(self._mesh, PartitionSpec())
    self._run = jax.jit(
      self._run_fn,
      in_shardings=(weights, layers, modules, whole),
      out_shardings=(whole, whole, layers, modules),
      donate_argnums=(1, 2),
    )
    self._draft = jax.jit(
      self._draft_fn,
      in_shardings=(weights, modules, whole),
      out_shardings=(whole, modules),
      static_argnames=("count",),
      donate_argnums=(1,),
    )
    self._sample = jax.jit(
      self._sample_fn, in_shardings=whole, out_shardings=whole
    )
    self._prepare = jax.jit(self._prepare_fn, out_shardings=weights)
    self.set_weights(self.prepare(state))

  @property
  def compilations(self) -> int:
    """Traces of all device functions so far, for tests."""
    return self._compiled + self._pages.compilations

  def prepare(self, state: nnx.State) -> list[jax.Array]:
    """A copy of a decoder's state in the form that `set_weights` takes.

    May be called from any thread; the state may be on other devices, and be
    donated elsewhere after.
    """
    return self._prepare(sharding.place(state, self._mesh))

  def set_weights(self, weights: list[jax.Array]) -> None:
    """Takes prepared weights; pages are kept."""
    self._weights = weights

  def run(
    self,
    decode: Sequence[batch_lib.Row],
    blocks: Sequence[batch_lib.Row],
    decode_steps: int = 1,
  ) -> list[list[sampling_lib.Sampled]]:
    """Adds tokens to sequences and samples the token after each row's last.

    Args:
      decode: rows of one token each, at most the largest bucket.
      blocks: rows of at most `prefill_chunk` tokens; several may be of one
        sequence. None if any of `decode` has drafts.
      decode_steps: how often each of `decode` goes on, by a token and the
        drafts that are accepted; without blocks and shapes if more than once.
        The pages must suffice.

    Returns:
      What each step sampled, token by token: of `decode`, then of `blocks`. A
      row has no more tokens after a draft of it was rejected.
    """
    batch = batch_lib.make(
      decode, blocks, *self._bucket(len(decode), len(blocks)), self.config
    )
    # Placed as what steps return is: their programs know arguments by that, too.
    batch = jax.device_put(batch, NamedSharding(self._mesh, PartitionSpec()))
    shaped = any(row.shapes is not None for row in (*decode, *blocks))
    count = max((row.drafts for row in decode), default=0)
    pages, results = self._pages, []
    for _ in range(decode_steps):
      if count:
        token_DW, pages.modules = self._draft(
          self._weights, pages.modules, batch, count
        )
        batch = batch.of(token_DW)
      result, logits_RV, pages.layers, pages.modules = self._run(
        self._weights, pages.layers, pages.modules, batch
      )
      if shaped:
        shapes = batch.shapes(decode, blocks)
        result = self._sample(
          result,
          logits_RV,
          sampling_lib.stack(shapes, self.model.vocab_size),
          np.array([shape is not None for shape in shapes]),
          np.array(any(shape is not None and shape.tops for shape in shapes)),
          batch,
        )
      *sampled, token_D1, start_D = result
      results.append(sampled)
      # The next step takes its tokens without waiting for them.
      batch = batch.of(token_D1, start_D)
    cut = lambda fields, size: [np.asarray(x)[:size] for x in fields]
    return [
      batch_lib.by_token(
        cut(fields_D, len(decode)),
        cut(fields_B, len(blocks)),
        np.asarray(taken_D)[: len(decode)],
      )
      for fields_D, fields_B, taken_D in results
    ]

  def move(self, moves: Sequence[prefix_cache.Move]) -> None:
    """Copies pages, in order, on the device and from and to the host."""
    self._pages.move(moves)

  def warm_up(self) -> None:
    """Compiles every shape of a step, and moves.

    With `warm_shaped`, also what samples from edited logits, for as many edits
    as a context has tokens.
    """
    row = batch_lib.Row((0,), (0,), 0, 0, 1.0, 0, 1.0)
    for shapes in self._warm_shapes():
      some = dataclasses.replace(row, shapes=shapes)
      for size_D, size_B in self.config.shapes():
        self.run([some] * size_D, [some] * size_B)
      for size_D in self.config.decode_rows if self.modules else ():
        for count in range(1, self.config.draft_tokens + 1):
          self.run([dataclasses.replace(some, drafts=count)] * size_D, [])
    self._pages.warm_up()

  def _warm_shapes(self) -> Iterator[batch_lib.Shapes | None]:
    """What rows have for `shapes` in steps that between them compile all."""
    if not self.config.warm_shaped:
      yield None
      return
    token = np.arange(self.model.vocab_size, dtype=np.int32)
    one = np.ones(len(token), np.float32)
    for size in sampling_lib.edit_sizes():
      shape = sampling_lib.Shape(token[:size], one[:size], 0 * one[:size])
      yield lambda drafts, shape=shape: [shape] * (1 + len(drafts))
      if size >= min(self.config.context, len(token)):
        return

  def _bucket(self, decode: int, blocks: int) -> tuple[int, int]:
    """The smallest compiled shape that holds as many rows."""
    fits = (
      (size_D, size_B)
      for size_D, size_B in self.config.shapes()
      if size_D >= decode and size_B >= blocks
    )
    return min(fits, key=lambda s: s[0] + s[1] * self.config.prefill_chunk)

  def _unroll(
    self, decoder: decoder_lib.Decoder
  ) -> decoder_lib.UnrolledDecoder:
    ways = self.config.tensor_parallel
    return decoder_lib.UnrolledDecoder(decoder, self.modules, ways)

  def _prepare_fn(self, state: nnx.State) -> list[jax.Array]:
    """Stacked weights as the unrolled forward pass wants them."""
    stacked = nnx.merge(self._stacked_graph, state)
    unrolled = nnx.state(self._unroll(stacked))
    return [jnp.copy(x) for x in jax.tree.leaves(unrolled)]

  def _run_fn(self, weights, layers, modules, batch):
    """Traced: writes the pages, attends over them, samples.

    The logits are returned, too, to be edited and sampled from again where a
    row has a shape.
    """
    self._compiled += 1
    decoder, config = self._merge(weights), self.config
    padding = -batch.size % config.row_multiple
    token_T, position_T = batch.tokens(padding)
    at = batch.places(config, padding)
    attends = [
      self._attend(cache, at, batch.decode, batch.blocks)
      for cache in [*layers, *(module.layer for module in modules)]
    ]
    trunk, others = attends[: len(layers)], attends[len(layers) :]
    hidden_TD = decoder.hidden(token_T, position_T, trunk)
    modules = drafts.keep(
      decoder,
      modules,
      others,
      token_T,
      position_T,
      hidden_TD,
      at,
      batch.places(config, padding, back=1),
    )
    layers = [attend.cache for attend in trunk]
    last_R = batch.last()
    padding = -len(last_R) % config.row_multiple
    hidden_RD = jnp.pad(hidden_TD[last_R], ((0, padding), (0, 0)))
    logits_RV = self._gather(decoder.logits(hidden_RD))
    # Padding repeats the last row: it limits nothing that no row limits.
    args = (jnp.pad(x, (0, padding), "edge") for x in batch.sample_args())
    sampled = sampling_lib.sample(logits_RV, *args)
    *fields, logits_RV = (x[: len(last_R)] for x in (*sampled, logits_RV))
    return _result(fields, batch.decode), logits_RV, layers, modules

  def _sample_fn(self, result, logits_RV, shapes, shaped_R, tops, batch):
    """Traced: samples again where a row has a shape.

    What was sampled of the others stays: another program, of other rows, would
    round it otherwise.
    """
    self._compiled += 1
    fields_D, fields_B, *_ = result
    *fields, top_tokens, top_logprobs = sampling_lib.sample_shaped(
      logits_RV, shapes, tops, *batch.sample_args()
    )
    fields = [
      jnp.where(shaped_R, x_R, jnp.concatenate([x_DW.reshape(-1), x_B]))
      for x_R, x_DW, x_B in zip(fields, fields_D, fields_B, strict=True)
    ]
    return _result([*fields, top_tokens, top_logprobs], batch.decode)

  def _draft_fn(self, weights, modules, batch, count):
    """Traced: drafts tokens; their keys and values are written, too."""
    self._compiled += 1
    rows = batch.decode
    seed_D, *rest = (x[: len(rows.start_R)] for x in batch.draw)

    def sample(logits_DV, position_D):
      logits_DV = self._gather(logits_DV)
      return sampling_lib.sample(logits_DV, seed_D, position_D, *rest)[0]

    decoder = self._merge(weights)
    return drafts.draft(decoder, self._attend, modules, rows, sample, count)

  def _attend(self, cache, at, decode, blocks) -> attention.Paged:
    return attention.Paged(self._kind, cache, at, decode, blocks, self._mesh)

  def _gather(self, logits_RV: jax.Array) -> jax.Array:
    """Whole on every device, each of which has computed a share."""
    for spec in (PartitionSpec(None, "tensor"), PartitionSpec()):
      at = NamedSharding(self._mesh, spec)
      logits_RV = jax.lax.with_sharding_constraint(logits_RV, at)
    return logits_RV

  def _merge(self, weights) -> decoder_lib.UnrolledDecoder:
    return nnx.merge(self._graph, jax.tree.unflatten(self._structure, weights))


def _result(fields, rows: attention.Rows):
  """What was sampled of rows and of blocks, and where the rows go on.

  Returns:
    Fields of `Sampled` [D, W, ...], and of blocks [B, ...]; how many of the W
    count, the last of these [D, 1], and its position, [D].
  """
  size = rows.token_RW.size
  fields_D = [
    x[:size].reshape(*rows.token_RW.shape, *x.shape[1:]) for x in fields
  ]
  fields_B = [x[size:] for x in fields]
  taken_D, last_D = sampling_lib.accepted(
    rows.token_RW, rows.length_R, fields_D[0]
  )
  return fields_D, fields_B, taken_D, last_D[:, None], rows.start_R + taken_D
