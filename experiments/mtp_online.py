"""Do modules that draft stay useful while RL moves the policy?

Question: over 50 RL steps, how many tokens does a sequence go on by in a step
that verifies three drafts, where the module is trained along and where it is
left as it was?

Command:  python -m experiments.mtp_online --picture --folder=docs/results
Hardware: two CPU cores, four minutes when they are idle.
Result:   2.13 tokens a step before RL; after 50 steps 2.52 trained along,
          1.79 left as it was (means of five steps), while the reward went from
          0.39 to 0.37; 1836 of 1836 responses the same in both arms
          (docs/results/mtp_online.json; two cores of a shared EPYC,
          2026-11-25).

A model of 2.5M parameters learns to list random words, letter by letter, from
scratch, and its one module with it. RL then rewards alphabetical order: the
policy moves away from what the module was trained on. One run shows both arms:
what is drafted changes no sampled token (docs/rollout_engine.md), so every step's
requests run a second time with the first module instead of the trained one.
"""

import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import pathlib
import random
import string
from typing import Any

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import drawing
from forge_jax import types
from forge_jax.engine import api, config, engine
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp, sharding
from forge_jax.trainer import update
from forge_jax.tree import pack

_STEPS = flags.DEFINE_integer("steps", 50, "of RL")
_PRETRAIN = flags.DEFINE_integer(
  "pretrain", 200, "updates before it; 0: from --first"
)
_FIRST = flags.DEFINE_string(
  "first", "runs/mtp_online/first.npz", "weights before RL"
)
MODEL_PATH = flags.DEFINE_string(
  "model", "runs/mtp_online/last.npz", "where the trained weights go"
)

RESULT = pathlib.Path("docs/results/mtp_online.json")
LETTERS = ":. " + string.ascii_lowercase + "012"  # digits: never said
STOP = LETTERS.index(".")
WORDS = 6  # of a list
GROUPS, MEMBERS = 6, 6
LISTS = 30  # of an update before RL
MODEL = model_config.ModelConfig(
  vocab_size=len(LETTERS),
  width=192,
  num_layers=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=48,
  mlp_width=512,
  max_context=128,
  tied_embeddings=True,
)
ENGINE = config.EngineConfig(
  slots=64,
  context=96,
  decode_rows=(1, 64),
  prefill_rows=(4, 16),
  draft_tokens=3,
)
PACK = pack.PackConfig(tokens=1280, edges=1280, rows=1280, buckets=1)
PRETRAIN = update.UpdateConfig(
  learning_rate=2e-3,
  warmup_updates=20,
  ratio_min=1.0,  # plain likelihood
  ratio_max=1.0,
  mtp_learning_rate=1e-3,
  mtp_top_k=32,
  remat="none",
)
RL = dataclasses.replace(
  PRETRAIN, learning_rate=5e-4, ratio_min=0.0, ratio_max=5.0
)


@dataclasses.dataclass(frozen=True)
class Figures:
  """One RL step."""

  reward: float  # mean share of neighbours in alphabetical order
  accept: float  # tokens a sequence goes on by, three being drafted
  accept_frozen: float  # the same, with the first module
  equal: int  # responses that are the same with either


class Lists:
  """The task: lists of words, which may be asked to begin with one."""

  def __init__(self, seed: int = 0):
    """A lexicon of 60 made-up words of three to six letters."""
    draw = random.Random(seed)
    word = lambda: "".join(
      draw.choice("aeiou" if n % 2 else "bcdfglmnprst")
      for n in range(draw.randint(3, 6))
    )
    self.words = sorted({word() for _ in range(60)})

  def text(self, draw: random.Random) -> tuple[str, str]:
    """A prompt and a response before RL: words in any order."""
    first, *others = draw.choices(self.words, k=WORDS + 1)
    return f"{first}:", f"{' '.join(others)}."

  def reward(self, response: str) -> float:
    """The share of `WORDS` - 1 neighbours that are words, and in order."""
    words = response.removesuffix(".").split(" ")
    if len(words) > WORDS or not response.endswith("."):
      return 0.0
    known = set(self.words)
    right = sum({a, b} <= known and a < b for a, b in itertools.pairwise(words))
    return right / (WORDS - 1)


def encode(text: str) -> np.ndarray:
  """Token ids of letters, int32."""
  return np.array([LETTERS.index(c) for c in text], np.int32)


def sample(
  name: str,
  prompt: Sequence[int],
  response: Sequence[int],
  logprobs: Sequence[float],
  advantage: float,
  tokens: int,
) -> types.Sample:
  """A response whose loss is a mean over all `tokens` of the update."""
  size = len(response)
  return types.Sample(
    name,
    np.asarray(prompt, np.int32),
    np.asarray(response, np.int32),
    np.asarray(logprobs, np.float32),
    np.full(size, advantage, np.float32),
    np.full(size, 1 / tokens, np.float32),
    np.zeros(size, np.int32),
  )


def copied(decoder: decoder_lib.Decoder) -> decoder_lib.Decoder:
  """The same with buffers of its own: those of a learner are donated."""
  graph, state = nnx.split(decoder)
  return nnx.merge(graph, jax.tree.map(jnp.copy, state))


class Learner:
  """Weights that are updated."""

  def __init__(self, decoder: decoder_lib.Decoder, config: update.UpdateConfig):
    self._updater = update.Updater(
      decoder, config, sharding.make_mesh(sharding.MeshConfig())
    )
    self.state = self._updater.initial_state()

  def update(self, samples: Sequence[types.Sample]) -> dict[str, np.ndarray]:
    """One update; returns metric sums."""
    batches, _ = pack.pack(samples, PACK, vocab_size=MODEL.vocab_size)
    gradient, sums = self._updater.zero_gradient(self.state), None
    for batch in batches:
      gradient, new = self._updater.accumulate(self.state, gradient, batch, 0)
      sums = new if sums is None else update.merge_sums(sums, new)
    self.state, _ = self._updater.apply(self.state, gradient)
    return {name: np.asarray(x) for name, x in sums.items()}

  def decoder(self) -> decoder_lib.Decoder:
    """A copy of the weights as a decoder."""
    return copied(self._updater.decoder(self.state))


def pretrain(task: Lists, updates: int) -> decoder_lib.Decoder:
  """A model, and its module, that list words in any order."""
  trunk = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0))
  learner = Learner(mtp.grow(trunk, 1, rngs=nnx.Rngs(params=1)), PRETRAIN)
  draw = random.Random(1)
  for step in range(updates):
    pairs = [map(encode, task.text(draw)) for _ in range(LISTS)]
    pairs = [tuple(pair) for pair in pairs]
    tokens = sum(len(response) for _, response in pairs)
    sums = learner.update(
      [
        sample(f"{n}", *pair, np.zeros(len(pair[1])), 1.0, tokens)
        for n, pair in enumerate(pairs)
      ]
    )
    if step % 50 == 0 or step == updates - 1:
      accepted = (sums["mtp_accepted"] / sums["mtp_weight"])[0]
      entropy = sums["entropy"] / sums["count"]
      print(f"update {step}: entropy {entropy:.3f}, accepted {accepted:.3f}")
  return learner.decoder()


async def respond(
  made: engine.JaxEngine, prompts: Sequence[Sequence[int]], seed: int
) -> list[tuple[list[int], list[float]]]:
  """Tokens and log-probabilities of the responses to prompts."""

  async def one(n: int, prompt: Sequence[int]):
    params = api.SamplingParams(
      max_tokens=64, stop_token_ids=(STOP,), seed=seed * 1000 + n
    )
    request = api.GenerateRequest(f"{seed}-{n}", tuple(prompt), params)
    chunks = [chunk async for chunk in made.generate(request)]
    return (
      [t for chunk in chunks for t in chunk.token_ids],
      [x for chunk in chunks for x in chunk.logprobs],
    )

  return await asyncio.gather(*map(one, range(len(prompts)), prompts))


def acceptance(made: engine.JaxEngine, prompts, seed: int):
  """Responses, and the tokens a sequence went on by where drafts were."""
  before = made.stats()
  replies = asyncio.run(respond(made, prompts, seed))
  after = made.stats()
  grown = lambda name: after[name] - before[name]
  length = 1 + grown("accepted_tokens") / grown("verified_rows")
  return replies, float(length)


def with_module_of(state: nnx.State, first: nnx.State) -> nnx.State:
  """A state whose modules are those of another."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x, y: y if mtp.of_module(path) else x, state, first
  )


def reinforce(
  task: Lists, decoder: decoder_lib.Decoder, steps: int
) -> tuple[list[Figures], decoder_lib.Decoder]:
  """RL towards alphabetical order; the figures of each step."""
  first = nnx.state(copied(decoder))
  learner = Learner(decoder, RL)
  made = engine.JaxEngine(
    learner.decoder(), dataclasses.replace(ENGINE, draft_adaptive=False)
  )
  made.start()
  draw, figures = random.Random(2), []
  for step in range(steps + 1):
    prompts = [encode(task.text(draw)[0]).tolist() for _ in range(GROUPS)]
    prompts = [prompt for prompt in prompts for _ in range(MEMBERS)]
    state = learner.state.params
    made.update_weights(
      types.WeightsVersion(2 * step, params=with_module_of(state, first))
    )
    same, frozen = acceptance(made, prompts, step)
    made.update_weights(types.WeightsVersion(2 * step + 1, params=state))
    replies, online = acceptance(made, prompts, step)
    texts = ["".join(LETTERS[t] for t in ids) for ids, _ in replies]
    rewards = np.array([task.reward(text) for text in texts])
    # All, but for a draw that falls within rounding of two tokens' boundary.
    equal = sum(a == b for (a, _), (b, _) in zip(same, replies, strict=True))
    figures.append(Figures(float(rewards.mean()), online, frozen, equal))
    print(f"step {step}: {figures[-1]} {texts[0]}", flush=True)
    means = rewards.reshape(GROUPS, MEMBERS).mean(1).repeat(MEMBERS)
    tokens = sum(len(ids) for ids, _ in replies)
    learner.update(
      [
        sample(f"{n}", prompt, ids, logprobs, reward - mean, tokens)
        for n, (prompt, (ids, logprobs), reward, mean) in enumerate(
          zip(prompts, replies, rewards, means, strict=True)
        )
      ]
    )
  made.stop()
  return figures, learner.decoder()


def picture(steps: Sequence[Mapping[str, float]]):
  """Tokens a sequence goes on by in a step, and the reward."""
  canvas = drawing.canvas(6.4, 3.0)
  left, right = canvas.subplots(1, 2)
  for key, name, colour in (
    ("accept", "trained along", drawing.SERIES[0]),
    ("accept_frozen", "left as it was", drawing.SERIES[1]),
  ):
    values = [step[key] for step in steps]
    left.plot(values, color=colour, linewidth=1.6, label=name)
  left.set_title("Tokens a verified step, 3 drafts", **drawing.title())
  left.legend(frameon=False, fontsize=8.5, labelcolor=drawing.MUTED)
  right.plot(
    [step["reward"] for step in steps], color=drawing.SERIES[2], linewidth=1.6
  )
  right.set_title("Reward: neighbours in order", **drawing.title())
  for ax in (left, right):
    drawing.plain(ax, "RL step")
  return canvas


def save(decoder: decoder_lib.Decoder, path: str) -> None:
  """Writes a decoder's weights."""
  params = decoder_lib.flatten(nnx.state(decoder))
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  np.savez(path, **{name: np.asarray(x) for name, x in params.items()})


def load(path: str) -> decoder_lib.Decoder:
  """Reads a decoder with one module."""
  with np.load(path) as params:
    shape = dataclasses.replace(MODEL, mtp_modules=1)
    return decoder_lib.Decoder.from_params(shape, dict(params))


def summary(figures: Sequence[Figures]) -> dict[str, Any]:
  """Acceptance before RL and after it, a mean of five steps, and all steps."""
  mean = lambda name: float(np.mean([getattr(f, name) for f in figures[-5:]]))
  return {
    "accept_start": figures[0].accept,
    "accept_end": mean("accept"),
    "accept_end_frozen": mean("accept_frozen"),
    "steps": [dataclasses.asdict(figure) for figure in figures],
  }


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  task = Lists()
  if _PRETRAIN.value:
    save(pretrain(task, _PRETRAIN.value), _FIRST.value)
  figures, decoder = reinforce(task, load(_FIRST.value), _STEPS.value)
  save(decoder, MODEL_PATH.value)
  result = summary(figures)
  print(json.dumps({k: v for k, v in result.items() if k != "steps"}))
  if drawing.PICTURE.value:
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    drawing.write("mtp_online", picture(result["steps"]))


if __name__ == "__main__":
  app.run(main)
