"""A model to begin with, where there is none: random weights, own tokenizer.

The tokenizer is a byte-level BPE of the texts that the domains' scripts
produce in real episodes; with it, a word of a closed vocabulary is one token.
"""

from collections.abc import Iterable, Mapping
import pathlib
from typing import Any

from tokenizers import Regex, pre_tokenizers, trainers
import transformers

from forge_jax import settings
from forge_jax.gateway import scripted
from forge_jax.model import scratch
from launch import build, services


def write(
  folder: pathlib.Path, values: Mapping[str, Any], section: Mapping[str, Any]
) -> None:
  """Makes a model for a run's domains, as a Hugging Face folder.

  Args:
    folder: to be made; it must not exist.
    values: the run's configuration.
    section: a ScratchConfig.

  Raises:
    ConfigError: a value that cannot work, or a domain without scripts.
    CheckpointError: the folder cannot be written.
  """
  config = settings.section(scratch.ScratchConfig, section, "scratch")
  plan = build.Blueprint(values)
  tokenizer = _train(_texts(plan, config), config)
  scratch.write(folder, config.shape(len(tokenizer)), plan.seed)
  tokenizer.save_pretrained(folder)


def _texts(plan: build.Blueprint, config: scratch.ScratchConfig) -> list[str]:
  """What a model is shown and says in episodes that scripts play."""
  tokenizer = scripted.byte_tokenizer()
  teacher = plan.teacher(tokenizer, max_context=2**20)
  with services.Services(
    teacher, tokenizer, plan.parts["gateway"], plan.side
  ) as running:
    result = running.evaluate("train", config.episodes)
  return [
    tokenizer.decode([*completion.prompt_ids, *completion.response_ids])
    for episode in result.episodes
    for completion in episode.completions
  ]


def _train(
  texts: Iterable[str], config: scratch.ScratchConfig
) -> transformers.PreTrainedTokenizerFast:
  """A tokenizer that spells the texts in few tokens."""
  base = scripted.byte_tokenizer()
  backend = base.backend_tokenizer
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(r" ?\w+|\s+|[^\w\s]+"), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=config.vocab_size,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      special_tokens=[
        str(token) for token in base.added_tokens_decoder.values()
      ],
      show_progress=False,
    ),
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token=base.eos_token,
    chat_template=base.chat_template,
  )
