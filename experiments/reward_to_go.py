"""Does reward-to-go make gradients less noisy than the outcome alone?

Question: episodes of S requests earn a process reward at each. Outcome-only
credit gives every request the episode's whole return; reward-to-go gives it what
was earned from it on. On the same rollouts, how noisy is the gradient of one
group under each, and does it point the same way?

Command:  python -m experiments.reward_to_go [--picture --folder=docs/results]
Hardware: a CPU core, two minutes in all.
Result:   docs/results/reward_to_go.md, 2026-11-30. Yes, with a baseline for each
          step, seeds 0 and 1: 0.77 and 0.76, 0.65 and 0.63, 0.58 and 0.57 of the
          variance with 2, 4, 8 requests. With one baseline for all steps
          reward-to-go is much worse than the outcome alone: 1.7 and 1.9, 4.3 and
          4.4, 9.5 and 11.0 times its variance.

A small decoder with random weights samples the episodes itself, so that
importance ratios are 1: each request is REQUEST tokens, followed by tokens of
the environment. A request's reward is the share of its tokens in the lower half
of the vocabulary, over S. Advantages are those of
`algo.advantages`, the loss is `algo.cispo`'s.
The noise is the trace of the covariance of a group's gradient, over that of
outcome-only credit. The means of two unbiased estimates differ by chance only:
`shift` is the squared norm of the mean difference over its expectation by chance
alone, which is 1.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

from absl import app
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import drawing
from experiments.toys import decoder as toy_decoder
from forge_jax.algo import advantages as algo
from forge_jax.algo import cispo
from forge_jax.model import decoder as decoder_lib

GROUPS, SEEDS = 128, (0, 1)  # groups of each setting; of weights and sampling
MEMBERS = 8  # episodes of a group
PROMPT, REQUEST, ANSWER = 4, 4, 2  # tokens
STEPS = (1, 2, 4, 8)
MODEL = toy_decoder.config(vocab_size=32)
ARMS = ("outcome only", "one baseline", "reward-to-go")


@dataclasses.dataclass(frozen=True)
class Noise:
  """What an arm's gradients look like beside outcome-only credit's."""

  variance: float  # trace of the covariance, over that of outcome-only
  shift: float  # of the mean, 1 by chance alone


def responses(steps: int) -> np.ndarray:
  """Bool [T]: which tokens of an episode the policy samples."""
  turn = [True] * REQUEST + [False] * ANSWER
  return np.array([False] * PROMPT + turn * steps)


def sample(
  decoder: decoder_lib.Decoder, steps: int, episodes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [B, T] and their log-probabilities [B, T]; 0 where not sampled."""
  sampled_T = responses(steps)
  rng = np.random.default_rng(seed)
  size = (episodes // MEMBERS, PROMPT)
  start = np.repeat(rng.integers(0, MODEL.vocab_size, size), MEMBERS, axis=0)
  tokens_BT = np.zeros((episodes, len(sampled_T)), np.int32)
  tokens_BT[:, :PROMPT] = start
  logprob_BT = np.zeros(tokens_BT.shape, np.float32)
  weights = nnx.split(decoder)
  key = jax.random.key(seed)
  for t in np.flatnonzero(sampled_T):
    tokens_BT[:, t], logprob_BT[:, t] = _next(*weights, tokens_BT, t, key)
  return tokens_BT, logprob_BT


@functools.partial(jax.jit, static_argnums=0)
def _next(graph, state, tokens_BT, t, key):
  """A token for place t, int32 [B], and its log-probability [B]."""
  log_BV = toy_decoder.logprobs(nnx.merge(graph, state), tokens_BT)[:, t - 1]
  token_B = jax.random.categorical(jax.random.fold_in(key, t), log_BV)
  return token_B, jnp.take_along_axis(log_BV, token_B[:, None], 1)[:, 0]


def advantages(tokens_BT: np.ndarray, steps: int, arm: str) -> np.ndarray:
  """Advantage [B, T] of each token, 0 where it was not sampled."""
  places = np.flatnonzero(responses(steps)).reshape(steps, REQUEST)
  low_BSR = tokens_BT[:, places] < MODEL.vocab_size // 2
  rewards_BS = low_BSR.mean(-1) / steps
  if arm == "outcome only":
    rewards_BS[:, -1], rewards_BS[:, :-1] = rewards_BS.sum(1), 0.0
  returns = [algo.reward_to_go(rewards_S, 1.0) for rewards_S in rewards_BS]
  advantage_BT = np.zeros(tokens_BT.shape, np.float32)
  for first in range(0, len(returns), MEMBERS):
    group = returns[first : first + MEMBERS]
    baselines = algo.group_baseline(group)
    for member, (returns_S, baseline_S) in enumerate(
      zip(group, baselines, strict=True)
    ):
      if arm == "one baseline":  # that of the first step, for all
        baseline_S = baseline_S[:1]
      advantage_BT[first + member, places] = (returns_S - baseline_S)[:, None]
  return advantage_BT


def gradients(
  decoder: decoder_lib.Decoder,
  tokens_BT: np.ndarray,
  logprob_BT: np.ndarray,
  advantage_BT: np.ndarray,
) -> np.ndarray:
  """Each group's gradient, float32 [groups, parameters]."""
  weights = nnx.split(decoder)
  arrays = [
    array.reshape(-1, MEMBERS, array.shape[-1])
    for array in (tokens_BT, logprob_BT, advantage_BT)
  ]
  return np.stack(
    [_gradient(*weights, *group) for group in zip(*arrays, strict=True)]
  )


@functools.partial(jax.jit, static_argnums=0)
def _gradient(graph, state, tokens_GT, old_GT, advantage_GT):
  """One group's gradient, float32 [parameters]."""
  sampled_T = responses((tokens_GT.shape[1] - PROMPT) // (REQUEST + ANSWER))
  weight_T = sampled_T[1:] / (MEMBERS * sampled_T.sum())

  def loss(state):
    log_GTV = toy_decoder.logprobs(nnx.merge(graph, state), tokens_GT)[:, :-1]
    following = tokens_GT[:, 1:, None]
    new_GT = jnp.take_along_axis(log_GTV, following, -1)[..., 0]
    return cispo.cispo_loss(
      new_GT,
      old_GT[:, 1:],
      advantage_GT[:, 1:],
      jnp.broadcast_to(weight_T, new_GT.shape),
    )[0]

  leaves = jax.tree.leaves(jax.grad(loss)(state))
  return jnp.concatenate([leaf.ravel() for leaf in leaves])


def measure(steps: int, groups: int, seed: int) -> dict[str, Noise]:
  """The noise of each arm on the same rollouts."""
  decoder = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=seed))
  rollouts = sample(decoder, steps, groups * MEMBERS, seed)
  found = {
    arm: gradients(decoder, *rollouts, advantages(rollouts[0], steps, arm))
    for arm in ARMS
  }
  base = found["outcome only"]
  noise = {}
  for arm, gradient in found.items():
    difference = gradient - base
    chance = _trace(difference) / groups
    shift = float((difference.mean(0) ** 2).sum())
    noise[arm] = Noise(
      _trace(gradient) / _trace(base), shift / chance if chance else 0.0
    )
  return noise


def _trace(gradient: np.ndarray) -> float:
  """Trace of the covariance of the rows."""
  return float(gradient.var(0, ddof=1).sum())


def draw(variances: Mapping[str, Mapping[int, Sequence[float]]]):
  """The picture: by arm, over the requests of an episode, each seed a dot."""
  picture = drawing.canvas(6.4, 3.0)
  ax = picture.subplots()
  drawing.plain(ax, "requests of an episode", "variance / outcome only")
  for color, (arm, by_steps) in zip(
    drawing.SERIES, variances.items(), strict=False
  ):
    steps = sorted(by_steps)
    means = [np.mean(by_steps[s]) for s in steps]
    ax.plot(steps, means, color=color, label=arm)
    for s in steps:
      ax.plot([s] * len(by_steps[s]), by_steps[s], ".", color=color)
  ax.set_xscale("log", base=2)
  ax.set_yscale("log")
  ax.set_xticks(STEPS, [str(s) for s in STEPS])
  ax.legend(frameon=False, fontsize=8.5)
  return picture


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  print("| requests | seed | credit | variance | shift |")
  print("| --- | --- | --- | --- | --- |")
  variances = {arm: {s: [] for s in STEPS} for arm in ARMS}
  for steps in STEPS:
    for seed in SEEDS:
      for arm, noise in measure(steps, GROUPS, seed).items():
        variances[arm][steps].append(noise.variance)
        print(
          f"| {steps} | {seed} | {arm} | {noise.variance:.2f} "
          f"| {noise.shift:.2f} |",
          flush=True,
        )
  if drawing.PICTURE.value:
    drawing.write("reward_to_go", draw(variances))


if __name__ == "__main__":
  app.run(main)
