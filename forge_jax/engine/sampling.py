"""Sampling on the device: one token a row, with its log-probability.

Most rows are drawn from the model's logits as they are, in one function with
the forward pass (`sample`). The others go a second way, a function of its own
on the logits (`sample_shaped`), so that what they ask for costs and compiles
nothing for anyone else: each row has a `Shape`, made on the host for this one
token.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from forge_jax.engine import api

_BLOCK = 256
_FEWEST_EDITS = 64  # the smallest bucket of edits a row


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """How one row's next token departs from the model's logits; on the host.

  The edits are of distinct tokens: a logit becomes itself divided by `factor`,
  or times it where it is negative, plus `bias`.
  """

  token_E: np.ndarray  # int32
  factor_E: np.ndarray  # float32, positive
  bias_E: np.ndarray  # float32
  allowed: np.ndarray | None = None  # uint32, a bit a token; None: all are
  tops: bool = False  # whether the most likely tokens are wanted

  @classmethod
  def make(
    cls,
    params: api.SamplingParams,
    prompt: np.ndarray,
    response: Sequence[int],
    allowed: np.ndarray | None = None,
  ) -> "Shape | None":
    """What a request's next token needs; None if `sample` will do.

    Args:
      params: of the request.
      prompt: int32, its prompt.
      response: its tokens so far.
      allowed: uint32 [ceil(V / 32)], bit t % 32 of word t // 32 says whether
        token t may be sampled; None: every token.
    """
    tokens = np.empty(0, np.int32)
    factor = bias = np.empty(0, np.float32)
    if edits(params):
      said, count = np.unique(
        np.asarray(response, np.int32), return_counts=True
      )
      added = dict(params.logit_bias)
      seen = prompt if params.repetition_penalty != 1 else ()
      tokens = np.unique(
        np.concatenate([said, seen, list(added)]).astype(np.int32)
      )
      factor = np.where(
        np.isin(tokens, np.concatenate([said, seen])),
        np.float32(params.repetition_penalty),
        np.float32(1),
      )
      bias = np.array([added.get(t, 0.0) for t in tokens.tolist()], np.float32)
      bias[np.searchsorted(tokens, said)] -= (
        params.presence_penalty + params.frequency_penalty * count
      ).astype(np.float32)
    elif allowed is None and not params.top_logprobs:
      return None
    return cls(tokens, factor, bias, allowed, params.top_logprobs > 0)


def edits(params: api.SamplingParams) -> bool:
  """Whether a request changes single tokens' logits."""
  return bool(
    params.logit_bias
    or params.presence_penalty
    or params.frequency_penalty
    or params.repetition_penalty != 1
  )


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
  """The tokens of a step's rows; on the host, aligned."""

  token_R: np.ndarray  # int32; -1: this row has none
  logprob_R: np.ndarray  # float32, nats
  # [R, MOST_TOP_LOGPROBS] or fewer, likeliest first; None: no row wants them.
  top_token: np.ndarray | None = None
  top_logprob: np.ndarray | None = None

  def tops(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of a row, without impossible ones."""
    return tuple(
      (token, logprob)
      for token, logprob in zip(
        self.top_token[row, :count].tolist(),
        self.top_logprob[row, :count].tolist(),
        strict=True,
      )
      if logprob > -np.inf
    )


def edit_sizes() -> Iterator[int]:
  """The bucketed numbers of edits a row, ascending."""
  return (_FEWEST_EDITS * 8**n for n in itertools.count())


def stack(
  shapes: Sequence[Shape | None], vocab: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """The rows' shapes as arrays of bucketed size, for `sample_shaped`.

  Returns:
    token [R, E] int32, `vocab` where there is no edit; factor and bias [R, E]
    float32; allowed [R, ceil(V / 32)] uint32.
  """
  most = max((len(s.token_E) for s in shapes if s is not None), default=0)
  size = next(size for size in edit_sizes() if size >= most)
  token = np.full((len(shapes), size), vocab, np.int32)
  factor = np.ones((len(shapes), size), np.float32)
  bias = np.zeros((len(shapes), size), np.float32)
  allowed = np.full((len(shapes), -(-vocab // 32)), 2**32 - 1, np.uint32)
  for row, shape in enumerate(shapes):
    if shape is None:
      continue
    count = len(shape.token_E)
    token[row, :count] = shape.token_E
    factor[row, :count] = shape.factor_E
    bias[row, :count] = shape.bias_E
    if shape.allowed is not None:
      allowed[row] = shape.allowed
  return token, factor, bias, allowed


def sample_shaped(
  logits_RV: jnp.ndarray,
  shapes: tuple[jnp.ndarray, ...],
  tops: jnp.ndarray,
  *row_args: jnp.ndarray,
) -> tuple[jnp.ndarray, ...]:
  """Samples like `sample`, from logits that are edited and masked first.

  Args:
    logits_RV: float32.
    shapes: what `stack` returns.
    tops: bool, whether to find the most likely tokens, too.
    *row_args: of `sample`, from the seeds on.

  Returns:
    token_R int32 and logprob_R float32; likeliest first, the tokens int32 and
    their log-probabilities float32, each [R, min(MOST_TOP_LOGPROBS, V)]: zeros
    without `tops`.
  """
  token_RE, factor_RE, bias_RE, allowed = shapes
  vocab = logits_RV.shape[-1]
  old_RE = jnp.take_along_axis(
    logits_RV, jnp.minimum(token_RE, vocab - 1), axis=1
  )
  new_RE = jnp.where(old_RE > 0, old_RE / factor_RE, old_RE * factor_RE)
  rows_R1 = jnp.arange(len(logits_RV))[:, None]
  logits_RV = logits_RV.at[rows_R1, token_RE].set(new_RE + bias_RE, mode="drop")
  bit_32 = jnp.arange(32, dtype=jnp.uint32)
  bits = (allowed[:, :, None] >> bit_32[None, None]) & 1
  allowed_RV = bits.reshape(len(bits), -1)[:, :vocab] > 0
  logits_RV = jnp.where(allowed_RV, logits_RV, -jnp.inf)
  logits_RV = _scaled(logits_RV, *row_args[2:])
  count = min(api.MOST_TOP_LOGPROBS, vocab)

  def find(logits_RV):
    return tuple(jax.lax.top_k(jax.nn.log_softmax(logits_RV, axis=-1), count))

  def nothing(logits_RV):
    zeros = jnp.zeros((len(logits_RV), count), logits_RV.dtype)
    return zeros, zeros.astype(jnp.int32)

  top, token = jax.lax.cond(tops, find, nothing, logits_RV)
  return *_sample(logits_RV, *row_args[:3]), token, top


def sample(
  logits_RV: jnp.ndarray,
  seed_R: jnp.ndarray,
  position_R: jnp.ndarray,
  temperature_R: jnp.ndarray,
  top_k_R: jnp.ndarray,
  top_p_R: jnp.ndarray,
  min_p_R: jnp.ndarray,
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """Samples each row from its own distribution with its own random number.

  The random number depends on (seed, position) alone, so that a request's
  tokens do not depend on what else is in the batch. The logits are
  searched for limits only when a row limits top-k, top-p or min-p.

  Args:
    logits_RV: float32.
    seed_R: uint32, the request's seed.
    position_R: int32, the position of the token to be sampled.
    temperature_R: float32; 0 takes the most likely token.
    top_k_R: int32, 0 for no limit.
    top_p_R: float32 in (0, 1].
    min_p_R: float32 in [0, 1].

  Returns:
    token_R int32 and logprob_R float32 under the distribution sampled from
    (of temperature 1 where the temperature is 0).
  """
  logits_RV = _scaled(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
  return _sample(logits_RV, seed_R, position_R, temperature_R)


def accepted(
  token_DW: jnp.ndarray, length_D: jnp.ndarray, sampled_DW: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """How many sampled tokens count where the model ran on drafts of them.

  A draft is accepted if it is the token that is sampled in its place. This is
  rejection sampling (Leviathan et al., 2023, arXiv 2211.17192) of a proposal
  that is certain: draft d is accepted with its probability p(d), and a token
  sampled in its stead has distribution p given that it is not d. Since a token
  is sampled from p by a random number of its own, whatever was drafted, drafts
  change neither the distribution nor the tokens. They are drawn by the same
  random numbers (`sample`), so that p and the draft's q pick the same token
  where their cumulative masses overlap: drafts as good as p are all accepted.

  Args:
    token_DW: int32, what the model ran on: a token, then drafts.
    length_D: int32, how many of the W these are; the rest is padding.
    sampled_DW: int32, sampled after each.

  Returns:
    The number of tokens that count, 1 to W, and the last of these; int32 [D].
  """
  width = token_DW.shape[1]
  right_DW = sampled_DW[:, :-1] == token_DW[:, 1:]
  right_DW &= jnp.arange(1, width)[None] < length_D[:, None]
  more_D = jnp.cumprod(right_DW.astype(jnp.int32), axis=1).sum(1)
  last_D = jnp.take_along_axis(sampled_DW, more_D[:, None], axis=1)[:, 0]
  return more_D + 1, last_D


def _scaled(
  logits_RV: jnp.ndarray,
  temperature_R: jnp.ndarray,
  top_k_R: jnp.ndarray,
  top_p_R: jnp.ndarray,
  min_p_R: jnp.ndarray,
) -> jnp.ndarray:
  """The logits of the distribution to sample from."""
  scale_R = jnp.where(temperature_R == 0, 1.0, temperature_R)
  logits_RV = logits_RV / scale_R[:, None]
  limits = (top_k_R, top_p_R, min_p_R)
  limited_R = (top_k_R > 0) | (top_p_R < 1) | (min_p_R > 0)
  return jax.lax.cond(
    limited_R.any(), _filter, lambda logits, *_: logits, logits_RV, *limits
  )


def _sample(
  logits_RV: jnp.ndarray,
  seed_R: jnp.ndarray,
  position_R: jnp.ndarray,
  temperature_R: jnp.ndarray,
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """Draws from the softmax of each row, or takes its peak."""
  # By blocks, which vectorise: one pass over a whole row does not on a CPU.
  vocab = logits_RV.shape[-1]
  blocks = -(-vocab // _BLOCK)
  padding = ((0, 0), (0, blocks * _BLOCK - vocab))
  logits_RNI = jnp.pad(logits_RV, padding, constant_values=-jnp.inf)
  logits_RNI = logits_RNI.reshape(-1, blocks, _BLOCK)
  peak_RN = logits_RNI.max(-1)
  peak_R = peak_RN.max(-1)
  uniform_R = jax.vmap(
    lambda seed, position: jax.random.uniform(
      jax.random.fold_in(jax.random.key(seed), position)
    )
  )(seed_R, position_R)
  mass_RNI = jnp.exp(logits_RNI - peak_R[:, None, None])
  drawn_R, total_R = _draw(mass_RNI, uniform_R)
  block_R = peak_RN.argmax(-1)
  likeliest_R = block_R * _BLOCK + _pick(logits_RNI, block_R).argmax(-1)
  token_R = jnp.where(temperature_R == 0, likeliest_R, drawn_R)
  chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
  # Rounding can leave the draw in a block without mass.
  impossible_R = chosen_R == -jnp.inf
  token_R = jnp.where(impossible_R, likeliest_R, token_R)
  chosen_R = jnp.where(impossible_R, peak_R, chosen_R)
  return token_R.astype(jnp.int32), chosen_R - peak_R - jnp.log(total_R)


def _draw(
  mass_RNI: jnp.ndarray, uniform_R: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """Inverts the cumulative mass at `uniform * total`, block first.

  Returns the drawn index and the total mass of each row.
  """
  ends = jnp.cumsum(mass_RNI.sum(-1), axis=-1)
  total_R = ends[:, -1]
  goal_R = uniform_R * total_R
  block_R = _first_above(ends, goal_R)
  before_R = jnp.where(
    block_R > 0,
    jnp.take_along_axis(ends, jnp.maximum(block_R - 1, 0)[:, None], 1)[:, 0],
    0.0,
  )
  inside = _pick(mass_RNI, block_R)
  offset_R = _first_above(jnp.cumsum(inside, axis=-1), goal_R - before_R)
  # Rounding can leave the goal past the block's end, or on a token without
  # mass; the block's likeliest token then stands in.
  has_mass_R = jnp.take_along_axis(inside, offset_R[:, None], 1)[:, 0] > 0
  offset_R = jnp.where(has_mass_R, offset_R, inside.argmax(-1))
  return block_R * _BLOCK + offset_R, total_R


def _pick(blocks_RNI: jnp.ndarray, block_R: jnp.ndarray) -> jnp.ndarray:
  """One block of each row, [R, I]."""
  return jnp.take_along_axis(blocks_RNI, block_R[:, None, None], 1)[:, 0]


def _first_above(ends: jnp.ndarray, goal_R: jnp.ndarray) -> jnp.ndarray:
  """Index of the first cumulative value above the goal; the last if none."""
  below = (ends <= goal_R[:, None]).sum(-1)
  return jnp.minimum(below, ends.shape[-1] - 1)


def _filter(
  logits_RV: jnp.ndarray,
  top_k_R: jnp.ndarray,
  top_p_R: jnp.ndarray,
  min_p_R: jnp.ndarray,
) -> jnp.ndarray:
  """Keeps the top-k tokens, then the smallest head of mass >= top-p.

  Of those, the tokens with at least min-p of the likeliest one's probability.
  What is equal to the last that is kept is kept, too. The last is found by
  bisection: on a CPU that takes an eighth of the time of a sort.
  """
  vocab = logits_RV.shape[-1]
  bits_RV = jax.lax.bitcast_convert_type(logits_RV, jnp.int32)
  # In the order of the logits: a negative one's bits count downwards.
  key_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)
  limit_R = jnp.where(top_k_R > 0, jnp.minimum(top_k_R, vocab), vocab)
  floor_R = jax.lax.cond(
    (limit_R < vocab).any(),
    lambda: _least(
      lambda x_R: (key_RV > x_R[:, None]).sum(-1) < limit_R, len(limit_R)
    ),
    lambda: jnp.full_like(limit_R, jnp.iinfo(jnp.int32).min),
  )
  peak_R1 = logits_RV.max(-1, keepdims=True)
  kept_RV = key_RV >= floor_R[:, None]
  mass_RV = jnp.where(kept_RV, jnp.exp(logits_RV - peak_R1), 0.0)
  # Rounding takes the sum past one: without a limit, all is kept.
  goal_R = jnp.where(top_p_R < 1, top_p_R * mass_RV.sum(-1), jnp.inf)

  def enough(x_R):
    above_RV = key_RV > x_R[:, None]
    return jnp.where(above_RV, mass_RV, 0.0).sum(-1) < goal_R

  # The first is kept whatever top-p is.
  head_R = jnp.minimum(_least(enough, len(goal_R)), key_RV.max(-1))
  kept_RV &= key_RV >= head_R[:, None]
  kept_RV &= logits_RV >= peak_R1 + jnp.log(min_p_R)[:, None]
  return jnp.where(kept_RV, logits_RV, -jnp.inf)


def _least(
  holds: Callable[[jnp.ndarray], jnp.ndarray], rows: int
) -> jnp.ndarray:
  """The least number of each row from which on `holds`; int32 [R]."""

  def halve(_, ends):
    low_R, high_R = ends  # it does not hold, and it does
    middle_R = (low_R >> 1) + (high_R >> 1) + (low_R & high_R & 1)
    found_R = holds(middle_R)
    return (
      jnp.where(found_R, low_R, middle_R),
      jnp.where(found_R, middle_R, high_R),
    )

  ends = (jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max)
  ends = [jnp.full(rows, end, jnp.int32) for end in ends]
  return jax.lax.fori_loop(0, 32, halve, tuple(ends))[1]
