"""The shape of a decoder: one frozen dataclass for every family."""

import dataclasses

from forge_jax import errors


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched past the trained context.

  `kind` is "linear" (every frequency divided by `factor`) or "llama3" (low
  frequencies divided by `factor`, high ones kept, those between blended; as
  published with Llama 3.1) or "yarn" (Peng et al., 2023, arXiv 2309.00071).
  """

  kind: str
  factor: float
  original_context: int
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1

  def __post_init__(self):
    if self.kind not in ("linear", "llama3", "yarn"):
      raise errors.ConfigError(
        f"rope scaling {self.kind!r} is unknown; expected one of linear, "
        "llama3, yarn"
      )


@dataclasses.dataclass(frozen=True)
class Flops:
  """Floating-point operations of a forward and a backward pass.

  Of the trunk: modules that predict further tokens are not counted.

  A multiplication and an addition count as two. The backward pass costs two
  forward passes; what it recomputes is not counted, nor is elementwise work.
  """

  token: float  # linear layers of one token
  pair: float  # attention of one visible (query, key), all heads and layers
  edge: float  # LM head of one predicted token


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer of the Llama or Qwen3 family.

  Grouped-query attention with rotary positions (halves rotated, not pairs),
  RMSNorm before each sub-layer, a gated SiLU MLP.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  max_context: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tied_embeddings: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  mtp_modules: int = 0  # multi-token-prediction modules; see model/mtp.py

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise errors.ConfigError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise errors.ConfigError(
        f"head_dim={self.head_dim} is odd; rotary positions need it even"
      )
    if self.mtp_modules < 0:
      raise errors.ConfigError(
        f"mtp_modules={self.mtp_modules}; expected 0 or more"
      )

  def flops(self) -> Flops:
    """What training costs: 6 per weight and token, 12 C per pair and head."""
    heads = self.num_heads * self.head_dim
    kv_heads = self.num_kv_heads * self.head_dim
    attention = 2 * self.width * (heads + kv_heads)  # query, out; key, value
    mlp = 3 * self.width * self.mlp_width  # gate, up, down
    return Flops(
      token=6 * self.num_layers * (attention + mlp),
      pair=12 * self.num_layers * heads,
      edge=6 * self.vocab_size * self.width,
    )
