"""Sizes and policies of the built-in engine; no JAX."""

import dataclasses

from forge_jax import errors


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Configures the built-in engine: device state, compiled shapes, policies."""

  slots: int = 64  # most sequences that are sampled at once
  context: int = 512  # most tokens of a sequence, prompt and response
  page: int = 64  # tokens of a cache page
  cache_tokens: int = 0  # most tokens cached; 0: every slot's whole context
  host_cache_tokens: int = 0  # most tokens kept in host memory when evicted
  decode_rows: tuple[int, ...] = (1, 8, 64)  # buckets of a step's decoding rows
  prefill_rows: tuple[int, ...] = (4, 16)  # buckets of a step's prompt blocks
  prefill_chunk: int = 16  # prompt tokens of a block
  row_multiple: int = 1  # rows of every matrix product are a multiple of this
  attention: str = "auto"  # or one of `attention.KINDS`
  tensor_parallel: int = 1  # devices that every step is split over
  prefill_patience: int = 4  # decode steps a part-filled prefill step waits
  decode_steps: int = 4  # steps that decode at once while nobody waits
  step_tokens: int = 0  # most tokens of a step; 0: as many as fit its shapes
  # Most tokens that a model's modules draft for a step; 0: none, and the
  # modules are not taken in.
  draft_tokens: int = 3
  draft_adaptive: bool = True  # fewer, or none, where that is faster
  # Whether what grammars, penalties, biases and alternatives need is compiled at
  # the start, not when a request first asks for it.
  warm_shaped: bool = False
  most_waiting: int = 8192  # requests in the queue; more are refused
  reuse: bool = True  # whether requests share what is cached
  # What new weights do to requests that have sampled tokens: "keep" what older
  # weights cached of them, or "recompute" it.
  on_update: str = "keep"
  # A response ends after so many tokens in a row that each had more than this
  # probability (MiniMax-M1, arXiv 2506.13585); 0: never.
  early_stop_tokens: int = 3000
  early_stop_probability: float = 0.99

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
    for name in ("page", "prefill_chunk", "row_multiple", "tensor_parallel"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(f"{name}={getattr(self, name)} is below 1")
    if self.cache_tokens and self.pages - 1 < self.sequence_pages:
      raise errors.ConfigError(
        f"cache_tokens={self.cache_tokens} is less than one context of "
        f"{self.context} in pages of {self.page}"
      )
    if self.on_update not in ("keep", "recompute"):
      raise errors.ConfigError(
        f"on_update={self.on_update!r}; expected 'keep' or 'recompute'"
      )
    for name in ("decode_steps", "most_waiting"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(f"{name}={getattr(self, name)} is below 1")
    if self.draft_tokens < 0:
      raise errors.ConfigError(f"draft_tokens={self.draft_tokens} is below 0")

  @property
  def sequence_pages(self) -> int:
    """Pages of a whole context."""
    return -(-self.context // self.page)

  @property
  def pages(self) -> int:
    """Pages on the device, the unused page 0 included."""
    if self.cache_tokens:
      return self.cache_tokens // self.page + 1
    return self.slots * self.sequence_pages + 1

  @property
  def host_pages(self) -> int:
    """Pages in host memory."""
    return self.host_cache_tokens // self.page

  def shapes(self) -> list[tuple[int, int]]:
    """Every (D, B) of a step: decoding, prefilling, or both at once."""
    return [
      *((rows, 0) for rows in self.decode_rows),
      *((0, blocks) for blocks in self.prefill_rows),
      *((self.decode_rows[-1], blocks) for blocks in self.prefill_rows),
    ]
