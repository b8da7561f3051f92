"""A two-layer transformer and random samples, shared by the tree's tests."""

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax import types
from forge_jax.algo import cispo
from forge_jax.tree import attention, unmerge

VOCAB, WIDTH, HEADS, KV_HEADS, CHANNELS, LAYERS = 13, 12, 4, 2, 6, 2


def sample(name, prompt, response, *, rng, weights=None):
  """A well-formed sample with random figures."""
  size = len(response)
  if weights is None:
    weights = np.full(size, 0.1)
  return types.Sample(
    name=name,
    prompt_ids=np.array(prompt, np.int32),
    response_ids=np.array(response, np.int32),
    logprobs=rng.normal(-2.5, 0.3, size).astype(np.float32),
    advantages=rng.normal(size=size).astype(np.float32),
    weights=np.array(weights, np.float32),
    versions=rng.integers(0, 9, size).astype(np.int32),
  )


def random_samples(rng, count, *, longest=12, alphabet=3):
  """Samples over few tokens, so that prefixes meet by chance."""
  result = []
  for i in range(count):
    prompt = rng.integers(0, alphabet, rng.integers(1, longest))
    response = rng.integers(0, alphabet, rng.integers(1, longest))
    weights = rng.choice([0.0, 0.05, 0.2], len(response), p=[0.2, 0.4, 0.4])
    result.append(sample(f"s{i}", prompt, response, rng=rng, weights=weights))
  return result


def init(seed, dtype):
  """Random parameters."""
  rng = np.random.default_rng(seed)

  def make(*shape):
    return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, dtype)

  return {
    "embed": make(VOCAB, WIDTH),
    "layers": {
      "q": make(LAYERS, WIDTH, HEADS * CHANNELS),
      "k": make(LAYERS, WIDTH, KV_HEADS * CHANNELS),
      "v": make(LAYERS, WIDTH, KV_HEADS * CHANNELS),
      "o": make(LAYERS, HEADS * CHANNELS, WIDTH),
      "up": make(LAYERS, WIDTH, 2 * WIDTH),
      "down": make(LAYERS, 2 * WIDTH, WIDTH),
    },
  }


def _rotate(x_BTHC, position_BT):
  half = CHANNELS // 2
  rate = jnp.asarray(0.5 ** np.arange(half), x_BTHC.dtype)
  angle = (
    position_BT[..., None, None].astype(x_BTHC.dtype) * rate[None, None, None]
  )
  a, b = x_BTHC[..., :half], x_BTHC[..., half:]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _norm(x):
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def hidden(params, tokens_BT, position_BT, attend):
  """Final hidden states; layers scanned and rematerialised."""
  B, T = tokens_BT.shape

  @jax.checkpoint
  def layer(x, p):
    h = _norm(x)
    q, k, v = ((h @ p[n]).reshape(B, T, -1, CHANNELS) for n in "qkv")
    o = attend(_rotate(q, position_BT), _rotate(k, position_BT), v)
    x = x + o.reshape(B, T, -1) @ p["o"]
    return x + jax.nn.silu(_norm(x) @ p["up"]) @ p["down"], None

  x = jax.lax.scan(layer, params["embed"][tokens_BT], params["layers"])[0]
  return _norm(x)


def tree_loss(params, batch, *, block, implementation, chunk=8):
  """CISPO of a packed batch."""

  def attend(q, k, v):
    return attention.tree_attention(
      q, k, v, batch.layout, block=block, implementation=implementation
    )

  h_BTD = hidden(params, batch.tokens_BT, batch.position_BT, attend)
  logprob_BE, _ = unmerge.edge_logprobs(
    h_BTD,
    batch.edge_parent_BE,
    batch.edge_token_BE,
    lambda h: h @ params["embed"].T,
    chunk=chunk,
  )
  logprob_BM = unmerge.by_row(logprob_BE, batch.row_edge_BM)
  return cispo.cispo_loss(
    logprob_BM, batch.old_logprob_BM, batch.advantage_BM, batch.weight_BM
  )[0]


def _causal(q, k, v):
  """Plain causal attention, one key head a query head."""
  T, groups = q.shape[1], q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
  s = jnp.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(CHANNELS).astype(q.dtype)
  s = jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], s, -1e30)
  return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(s, -1), v)


def request_arrays(samples, count, length):
  """Samples side by side, [count, length], padded at the end."""
  tokens = np.zeros((count, length), np.int32)
  old, advantage, weight = (np.zeros((count, length)) for _ in range(3))
  for i, s in enumerate(samples):
    start, stop = len(s.prompt_ids), len(s.prompt_ids) + len(s.response_ids)
    tokens[i, :stop] = np.concatenate([s.prompt_ids, s.response_ids])
    old[i, start:stop] = s.logprobs
    advantage[i, start:stop] = s.advantages
    weight[i, start:stop] = s.weights
  return tokens, old, advantage, weight


def request_loss(params, tokens, old, advantage, weight):
  """CISPO of the samples one by one, written without the tree."""
  position = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  h = hidden(params, tokens, position, _causal)
  logprob = jax.nn.log_softmax(h[:, :-1] @ params["embed"].T)
  logprob = jnp.take_along_axis(logprob, tokens[:, 1:, None], 2)[..., 0]
  ratio = jax.lax.stop_gradient(jnp.exp(logprob - old[:, 1:]))
  ratio = jnp.minimum(ratio, 5.0)
  return -(weight[:, 1:] * ratio * advantage[:, 1:] * logprob).sum()
