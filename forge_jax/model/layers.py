"""The layers of a decoder; attention itself is injected.

Kernels are input-major (`y = x @ kernel`) and kept in the parameters' dtype;
a layer computes in the dtype of its input, norms and rotations in float32.
"""

from collections.abc import Callable, Sequence
import itertools

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from forge_jax.model import config as model_config
from forge_jax.model import rope

# (q [..., H, C], k [..., K, C], v [..., K, C]) -> o [..., H, C]
Attend = Callable[[jnp.ndarray, jnp.ndarray, jnp.ndarray], jnp.ndarray]
Angles = tuple[jnp.ndarray, jnp.ndarray]

_INIT_STD = 0.02


class Linear(nnx.Module):
  """y = x @ kernel (+ bias)."""

  def __init__(
    self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs
  ):
    self.kernel = nnx.Param(
      jax.random.normal(rngs.params(), (inputs, outputs)) * _INIT_STD
    )
    self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    return _affine(x, self.kernel, self.bias)


def _affine(
  x: jnp.ndarray, kernel: nnx.Param, bias: nnx.Param | None
) -> jnp.ndarray:
  # As one matrix: on a CPU the kernel's gradient is twice as fast when it
  # contracts one axis instead of several.
  y = x.reshape(-1, x.shape[-1]) @ kernel[...].astype(x.dtype)
  if bias is not None:
    y = y + bias[...].astype(x.dtype)[None]
  return y.reshape(*x.shape[:-1], -1)


def product(x: jnp.ndarray, kernel: jnp.ndarray) -> jnp.ndarray:
  """x [..., I] times the transpose of an output-major kernel [O, I]: [..., O].

  On a CPU a product reads its first factor as it lies and packs the second one
  first. So the larger one goes first, which for a few rows is two to three
  times as fast; without the barrier XLA would turn the product around again.
  """
  y = jnp.einsum("oi,ni->on", kernel, x.reshape(-1, x.shape[-1]))
  return lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


class Joined(nnx.Module):
  """Linear maps of one input as one product, for inference.

  Its rows are in as many parts as devices share them, each with a share of
  every map's.
  """

  def __init__(self, *linears: Linear, ways: int = 1):
    def join(arrays: Sequence[jnp.ndarray]) -> nnx.Param:
      split = [a.reshape(ways, -1, *a.shape[1:]) for a in arrays]
      joined = jnp.concatenate(split, axis=1)
      return nnx.Param(joined.reshape(-1, *joined.shape[2:]))

    kernels = [linear.kernel[...].T for linear in linears]
    self.matrix = join(kernels)  # output-major
    biases = [linear.bias for linear in linears]
    self.bias = None if biases[0] is None else join([b[...] for b in biases])
    widths = [len(kernel) // ways for kernel in kernels]
    self.ends = tuple(itertools.accumulate(widths))

  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    """What the maps give, [..., sum of their outputs], part by part."""
    y = product(x, self.matrix[...].astype(x.dtype))
    if self.bias is None:
      return y
    return y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)

  def split(self, x: jnp.ndarray) -> list[jnp.ndarray]:
    """What each of the maps gives."""
    y = self(x).reshape(*x.shape[:-1], -1, self.ends[-1])
    parts = jnp.split(y, self.ends[:-1], axis=-1)
    return [part.reshape(*x.shape[:-1], -1) for part in parts]


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis (Zhang & Sennrich, 2019)."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones((width,)))
    self.eps = eps

  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    # At least float32, and float64 where the caller computes in it.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
    normed = wide * jax.lax.rsqrt(mean_square + self.eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query attention around an injected `attend`."""

  def __init__(self, config: model_config.ModelConfig, *, rngs: nnx.Rngs):
    c = config
    query_width, key_width = (
      c.num_heads * c.head_dim,
      c.num_kv_heads * c.head_dim,
    )
    self.query = Linear(c.width, query_width, bias=c.qkv_bias, rngs=rngs)
    self.key = Linear(c.width, key_width, bias=c.qkv_bias, rngs=rngs)
    self.value = Linear(c.width, key_width, bias=c.qkv_bias, rngs=rngs)
    self.out = Linear(query_width, c.width, bias=c.out_bias, rngs=rngs)
    self.query_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
    self.key_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
    self.head_dim = c.head_dim
    self.joined = None  # query, key and value, once `join` was called

  def join(self, ways: int) -> None:
    """Makes its linear maps `Joined`."""
    parts = self.query, self.key, self.value
    self.joined = nnx.data(Joined(*parts, ways=ways))
    self.out = Joined(self.out)
    del self.query, self.key, self.value

  def __call__(
    self, x: jnp.ndarray, angles: Angles, attend: Attend
  ) -> jnp.ndarray:
    def heads(y):
      return y.reshape(*y.shape[:-1], -1, self.head_dim)

    if self.joined is None:
      q, k, v = self.query(x), self.key(x), self.value(x)
    else:
      q, k, v = self.joined.split(x)
    q, k, v = heads(q), heads(k), heads(v)
    if self.query_norm is not None:
      q, k = self.query_norm(q), self.key_norm(k)
    o = attend(rope.rotate(q, *angles), rope.rotate(k, *angles), v)
    return self.out(o.reshape(*x.shape[:-1], -1))


class Mlp(nnx.Module):
  """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer, 2020)."""

  def __init__(self, config: model_config.ModelConfig, *, rngs: nnx.Rngs):
    width, hidden, bias = config.width, config.mlp_width, config.mlp_bias
    self.gate = Linear(width, hidden, bias=bias, rngs=rngs)
    self.up = Linear(width, hidden, bias=bias, rngs=rngs)
    self.down = Linear(hidden, width, bias=bias, rngs=rngs)
    self.joined = None  # gate and up, once `join` was called

  def join(self, ways: int) -> None:
    """Makes its linear maps `Joined`."""
    self.joined = nnx.data(Joined(self.gate, self.up, ways=ways))
    self.down = Joined(self.down)
    del self.gate, self.up

  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    if self.joined is None:
      gate, up = self.gate(x), self.up(x)
    else:
      gate, up = self.joined.split(x)
    return self.down(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
  """Pre-norm attention and MLP, each with a residual."""

  def __init__(self, config: model_config.ModelConfig, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.width, config.norm_eps)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = RMSNorm(config.width, config.norm_eps)
    self.mlp = Mlp(config, rngs=rngs)

  def join(self, ways: int) -> None:
    """Makes its linear maps `Joined`, to be shared by so many devices."""
    self.attention.join(ways)
    self.mlp.join(ways)

  def __call__(
    self, x: jnp.ndarray, angles: Angles, attend: Attend
  ) -> jnp.ndarray:
    x = x + self.attention(self.attention_norm(x), angles, attend)
    return x + self.mlp(self.mlp_norm(x))


class MtpModule(nnx.Module):
  """Predicts one token further than the trunk has seen; see `mtp.py`."""

  def __init__(self, config: model_config.ModelConfig, *, rngs: nnx.Rngs):
    self.embed_norm = RMSNorm(config.width, config.norm_eps)
    self.hidden_norm = RMSNorm(config.width, config.norm_eps)
    self.project = Linear(2 * config.width, config.width, rngs=rngs)
    self.layer = DecoderLayer(config, rngs=rngs)
    self.final_norm = RMSNorm(config.width, config.norm_eps)

  def join(self, ways: int) -> None:
    """Makes its linear maps `Joined`, to be shared by so many devices."""
    self.project = Joined(self.project)
    self.layer.join(ways)

  def __call__(
    self,
    embedded: jnp.ndarray,
    before: jnp.ndarray,
    angles: Angles,
    attend: Attend,
  ) -> jnp.ndarray:
    """Hidden states [..., D] from tokens' vectors and the states before them."""
    both = [self.embed_norm(embedded), self.hidden_norm(before)]
    x = self.project(jnp.concatenate(both, axis=-1))
    return self.final_norm(self.layer(x, angles, attend))


class Embed(nnx.Module):
  """A table of token vectors, read as input or multiplied as LM head."""

  def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
    self.embedding = nnx.Param(
      jax.random.normal(rngs.params(), (vocab_size, width)) * _INIT_STD
    )

  def __call__(self, tokens: jnp.ndarray, dtype) -> jnp.ndarray:
    return self.embedding[...][tokens].astype(dtype)

  def logits(self, hidden: jnp.ndarray) -> jnp.ndarray:
    """Logits [..., V] of hidden states [..., D], in at least float32."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    flat = hidden.astype(dtype).reshape(-1, hidden.shape[-1])
    logits = jnp.einsum("nd,vd->nv", flat, self.embedding[...].astype(dtype))
    return logits.reshape(*hidden.shape[:-1], -1)
