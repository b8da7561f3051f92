"""A step's rows as arrays of a bucket's size, and what was sampled as rows."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax.engine import attention, sampling
from forge_jax.engine import config as config_lib

Shapes = Callable[[Sequence[int]], Sequence[sampling.Shape | None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One sequence's part of a step: a block of tokens, or one and its drafts."""

  pages: Sequence[int]  # of the sequence, up to these tokens
  tokens: Sequence[int]  # new tokens
  start: int  # position of the first of them
  seed: int
  temperature: float
  top_k: int
  top_p: float
  min_p: float = 0.0
  drafts: int = 0  # how many to draft after the one token
  # From the drafts to the shape of the token after the row's last, then of that
  # after each draft; None: the logits as they are.
  shapes: Shapes | None = None


class Draw(NamedTuple):
  """How each row's tokens are drawn; see `sampling.sample`."""

  seed_R: np.ndarray
  temperature_R: np.ndarray
  top_k_R: np.ndarray
  top_p_R: np.ndarray
  min_p_R: np.ndarray


class Batch(NamedTuple):
  """D decoding rows, of a token and its drafts, and B blocks.

  Its tokens T are those of the decoding rows, of the blocks, and padding. A
  token is sampled after each of R: every one of the decoding rows', and the
  last of each block.
  """

  decode: attention.Rows
  blocks: attention.Rows
  draw: Draw  # of D, then of B

  @property
  def size(self) -> int:
    """Tokens without padding."""
    return self.decode.token_RW.size + self.blocks.token_RW.size

  def of(
    self, token_DW: jax.Array, start_D: jax.Array | None = None
  ) -> "Batch":
    """With other tokens in the decoding rows, and other starts if given."""
    start_D = self.decode.start_R if start_D is None else start_D
    rows = self.decode._replace(token_RW=token_DW, start_R=start_D)
    return self._replace(decode=rows)

  def tokens(self, padding: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions [T]."""
    parts = (self.decode, self.blocks)
    return tuple(
      jnp.pad(jnp.concatenate([x.reshape(-1) for x in some]), (0, padding))
      for some in (
        [rows.token_RW for rows in parts],
        [rows.position_RW for rows in parts],
      )
    )

  def places(
    self, config: config_lib.EngineConfig, padding: int, back: int = 0
  ) -> tuple[jax.Array, jax.Array]:
    """Page and offset of each token, or of one `back` tokens before it, [T].

    The page of padding is past all there are.
    """
    parts = [
      rows.places(config.page, config.pages, back)
      for rows in (self.decode, self.blocks)
    ]
    page_T, offset_T = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return (
      jnp.pad(page_T, (0, padding), constant_values=config.pages),
      jnp.pad(offset_T, (0, padding)),
    )

  def last(self) -> jax.Array:
    """Which of the tokens one is sampled after, [R]."""
    each, (size_B, width) = (
      self.decode.token_RW.size,
      self.blocks.token_RW.shape,
    )
    last_B = jnp.maximum(self.blocks.length_R - 1, 0)
    last_B += each + width * jnp.arange(size_B)
    return jnp.concatenate([jnp.arange(each), last_B])

  def sample_args(self) -> list[jax.Array]:
    """What `sampling.sample` takes of each row, [R]."""
    size_D, width = self.decode.token_RW.shape
    blocks = self.blocks
    position_R = jnp.concatenate(
      [
        self.decode.position_RW.reshape(-1) + 1,
        blocks.start_R + blocks.length_R,
      ]
    )
    seed_R, *rest = (
      jnp.concatenate([jnp.repeat(x[:size_D], width), x[size_D:]])
      for x in self.draw
    )
    return [seed_R, position_R, *rest]

  def shapes(
    self, decode: Sequence[Row], blocks: Sequence[Row]
  ) -> list[sampling.Shape | None]:
    """The shapes of what is sampled, [R], of the rows it was made of."""
    token_DW = np.asarray(self.decode.token_RW)
    size_D, width = token_DW.shape
    count = token_DW.size + len(self.blocks.start_R)
    shapes: list[sampling.Shape | None] = [None] * count
    for n, row in enumerate(decode):
      if row.shapes is not None:
        some = row.shapes(token_DW[n, 1 : 1 + row.drafts].tolist())
        shapes[n * width : n * width + len(some)] = some
    for n, row in enumerate(blocks, size_D * width):
      if row.shapes is not None:
        [shapes[n]] = row.shapes(())
    return shapes


def make(
  decode: Sequence[Row],
  blocks: Sequence[Row],
  size_D: int,
  size_B: int,
  config: config_lib.EngineConfig,
) -> Batch:
  """Arrays of the given sizes; padding has no tokens."""
  size = size_D + size_B
  seed, top_k = np.zeros(size, np.uint32), np.zeros(size, np.int32)
  temperature, min_p = np.zeros((2, size), np.float32)
  top_p = np.ones(size, np.float32)
  for first, rows in ((0, decode), (size_D, blocks)):
    for i, row in enumerate(rows, first):
      seed[i], top_k[i] = row.seed, row.top_k
      temperature[i], top_p[i], min_p[i] = row.temperature, row.top_p, row.min_p
  return Batch(
    _rows(decode, size_D, 1, config),
    _rows(blocks, size_B, config.prefill_chunk, config),
    Draw(seed, temperature, top_k, top_p, min_p),
  )


def _rows(
  rows: Sequence[Row], size: int, width: int, config: config_lib.EngineConfig
) -> attention.Rows:
  # Room for a block's padding past the context.
  pages = config.sequence_pages + -(-width // config.page)
  table = np.zeros((size, pages), np.int32)
  token = np.zeros((size, width), np.int32)
  start, length = np.zeros((2, size), np.int32)
  for i, row in enumerate(rows):
    token[i, : len(row.tokens)] = row.tokens
    start[i], length[i] = row.start, len(row.tokens) + row.drafts
    table[i, : len(row.pages)] = row.pages
  return attention.Rows(token, start, length, table)


def by_token(
  decode: Sequence[np.ndarray], blocks: Sequence[np.ndarray], taken: np.ndarray
) -> list[sampling.Sampled]:
  """What a step sampled, token after token of its rows.

  Args:
    decode: fields of `sampling.Sampled`, [D, W, ...].
    blocks: the same, [B, ...].
    taken: [D], how many of the W tokens count.

  Returns:
    Of the decoding rows, then of the blocks. A row has no n-th token if no more
    than n count.
  """
  results = []
  for n in range(max(taken, default=1)):
    token_R, *rest = (
      np.concatenate([some[:, n], other])
      for some, other in zip(decode, blocks, strict=True)
    )
    token_R[: len(taken)][taken <= n] = -1
    results.append(sampling.Sampled(token_R, *rest))
  return results
