"""Reads a tokenizer, with its chat template, from a GGUF file or a folder."""

import os
import pathlib
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
import transformers

from forge_jax import errors, paths

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types that are never split
_BYTE_LEVEL = {  # GGUF's name of the split -> what comes before byte level
  "gpt-2": [],
  "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}


def load_tokenizer(
  path: str | os.PathLike[str],
) -> transformers.PreTrainedTokenizerFast:
  """Loads a fast tokenizer that has a chat template.

  Args:
    path: a GGUF file with a byte-level BPE, a folder in the Hugging Face
      format, or "package:<distribution>" for the GGUF inside a package.

  Raises:
    CheckpointError: there is no tokenizer at the path, it cannot be read, or
      it lacks something; the message names it.
  """
  path = paths.resolve_model_path(path)
  tokenizer = _from_folder(path) if path.is_dir() else _from_gguf(path)
  if not tokenizer.chat_template:
    raise errors.CheckpointError(f"{path}: the tokenizer has no chat template")
  return tokenizer


def _from_folder(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      str(path), local_files_only=True
    )
  except (OSError, ValueError, KeyError) as error:
    raise errors.CheckpointError(
      f"{path}: no tokenizer can be read: {error}"
    ) from error
  if not tokenizer.is_fast:
    raise errors.CheckpointError(f"{path}: tokenizer.json is missing")
  return tokenizer


def _from_gguf(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError) as error:
    raise errors.CheckpointError(f"{path}: not a GGUF file: {error}") from error
  fields = {key: field.contents() for key, field in reader.fields.items()}

  def need(key: str) -> Any:
    if key not in fields:
      raise errors.CheckpointError(f"{path}: the field {key!r} is missing")
    return fields[key]

  if need("tokenizer.ggml.model") != "gpt2":
    raise errors.CheckpointError(
      f"{path}: tokenizer.ggml.model is {fields['tokenizer.ggml.model']!r}; "
      "only byte-level BPE ('gpt2') can be read"
    )
  split = need("tokenizer.ggml.pre")
  if split not in _BYTE_LEVEL:
    raise errors.CheckpointError(
      f"{path}: tokenizer.ggml.pre is {split!r}; known are "
      f"{sorted(_BYTE_LEVEL)}. A folder with tokenizer.json can be used instead"
    )
  tokens = need("tokenizer.ggml.tokens")
  bpe = _byte_level_bpe(
    tokens,
    need("tokenizer.ggml.merges"),
    need("tokenizer.ggml.token_type"),
    split,
  )
  ids = {
    name: fields.get(f"tokenizer.ggml.{key}_token_id")
    for name, key in (
      ("bos_token", "bos"),
      ("eos_token", "eos"),
      ("unk_token", "unknown"),
      ("pad_token", "padding"),
    )
  }
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    chat_template=need("tokenizer.chat_template"),
    **{name: tokens[i] for name, i in ids.items() if i is not None},
  )


def _byte_level_bpe(
  tokens: list[str], merges: list[str], token_types: list[int], split: str
) -> Tokenizer:
  tokenizer = Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in merges],
      fuse_unk=False,
    )
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      *_BYTE_LEVEL[split],
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    tokenizer.add_tokens(
      [
        AddedToken(token, special=special, normalized=False)
        for token, found in zip(tokens, token_types, strict=True)
        if found == kind
      ]
    )
  return tokenizer
