"""A decoder's shape as `config.json` states it, in both directions.

Rotary parameters are read from `rope_parameters` (transformers 5) or from
`rope_theta` and `rope_scaling` (transformers 4), and written as both.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from forge_jax import errors
from forge_jax.model import config as model_config
from forge_jax.model import params as params_lib

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_CLASSES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
_MTP = "num_nextn_predict_layers"  # DeepSeek-V3's name; absent: none
# What each known scaling may state, beside rope_type, rope_theta and factor.
_SCALING_KEYS = {
  "default": set(),
  "linear": {"original_max_position_embeddings"},
  "llama3": {
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
  },
  "yarn": {
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
  },
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Json:
  """A JSON object that says where it is from."""

  values: Mapping[str, Any]
  where: str

  def need(self, key: str) -> Any:
    """A value that must be there."""
    if self.values.get(key) is None:
      raise errors.CheckpointError(f"{self.where}: {key!r} is missing")
    return self.values[key]

  def get(self, key: str, default: Any) -> Any:
    """A value, or the default where it is absent or null."""
    value = self.values.get(key)
    return default if value is None else value

  def number(self, key: str, default: float | None = None) -> float:
    """A number; without a default the key must be there."""
    value = self.need(key) if default is None else self.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise errors.CheckpointError(
        f"{self.where}: {key!r} is {value!r}, expected a number"
      )
    return float(value)

  def integer(self, key: str, default: int | None = None) -> int:
    """A whole number from 1 on, otherwise as `number`."""
    value = self.number(key, default)
    if value != int(value) or value < 1:
      raise errors.CheckpointError(
        f"{self.where}: {key!r} is {value:g}, expected a whole number from 1"
      )
    return int(value)

  def refuse(self, key: str, why: str) -> None:
    """Fails where a key is set to anything but null or false."""
    if self.values.get(key):
      raise errors.CheckpointError(
        f"{self.where}: {key!r} is {self.values[key]!r}; {why}"
      )


def from_json(
  values: Mapping[str, Any], where: str
) -> model_config.ModelConfig:
  """The shape that a `config.json` describes.

  Args:
    values: the file's content.
    where: the file's path, for messages.

  Raises:
    CheckpointError: the family is not known, a key is missing, or the model
      has something that the decoder lacks; the message names it.
  """
  json = _Json(values, where)
  family = json.need("model_type")
  if family not in _FAMILIES:
    raise errors.CheckpointError(
      f"{where}: model_type {family!r} is unknown; expected one of "
      f"{', '.join(_FAMILIES)}"
    )
  activation = json.get("hidden_act", "silu")
  if activation != "silu":
    raise errors.CheckpointError(
      f"{where}: hidden_act is {activation!r}, expected 'silu'"
    )
  json.refuse("quantization_config", "only plain tensors can be read")
  window = "the decoder's attention has no window"
  json.refuse("use_sliding_window", window)
  if family == "mistral":
    json.refuse("sliding_window", window)
  width = json.integer("hidden_size")
  heads = json.integer("num_attention_heads")
  channels = 128 if family == "qwen3" else max(width // heads, 1)
  bias = family != "mistral" and json.get("attention_bias", False)
  theta, scaling = _rope(json)
  return params_lib.decoder_config(
    where,
    vocab_size=json.integer("vocab_size"),
    width=width,
    num_layers=json.integer("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=json.integer("num_key_value_heads", heads),
    head_dim=json.integer("head_dim", channels),
    mlp_width=json.integer("intermediate_size"),
    max_context=json.integer("max_position_embeddings"),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=json.number("rms_norm_eps", 1e-6),
    tied_embeddings=json.get("tie_word_embeddings", False),
    qkv_bias=family == "qwen2" or bias,
    out_bias=family != "qwen2" and bias,
    mlp_bias=family == "llama" and json.get("mlp_bias", False),
    qk_norm=family == "qwen3",
    mtp_modules=int(json.number(_MTP, 0)),
  )


def to_json(config: model_config.ModelConfig, dtype: str) -> dict[str, Any]:
  """What `config.json` says of a shape.

  Args:
    config: the decoder's shape.
    dtype: of the tensors, as NumPy names it.

  Raises:
    CheckpointError: no known family has these biases and norms.
  """
  c = config
  family = _family(config)
  rope: dict[str, Any] = {"rope_type": "default"}
  if c.rope_scaling is not None:
    rope = _scaling_to_json(c.rope_scaling)
  return {
    "architectures": [_CLASSES[family]],
    "model_type": family,
    "vocab_size": c.vocab_size,
    "hidden_size": c.width,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    "intermediate_size": c.mlp_width,
    "max_position_embeddings": c.max_context,
    "rms_norm_eps": c.norm_eps,
    "hidden_act": "silu",
    "tie_word_embeddings": c.tied_embeddings,
    "attention_bias": c.qkv_bias,
    "mlp_bias": c.mlp_bias,
    "rope_theta": c.rope_theta,
    "rope_scaling": None if c.rope_scaling is None else rope,
    "rope_parameters": {"rope_theta": c.rope_theta, **rope},
    "torch_dtype": dtype,
    "dtype": dtype,
  } | ({_MTP: c.mtp_modules} if c.mtp_modules else {})


def _family(config: model_config.ModelConfig) -> str:
  biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
  if config.qk_norm:
    if biases in ((False, False, False), (True, True, False)):
      return "qwen3"
  elif biases == (True, False, False):
    return "qwen2"
  elif config.qkv_bias == config.out_bias:
    return "llama"
  raise errors.CheckpointError(
    f"no known family has qk_norm={config.qk_norm}, "
    f"qkv_bias={config.qkv_bias}, out_bias={config.out_bias} and "
    f"mlp_bias={config.mlp_bias}"
  )


def _rope(json: _Json) -> tuple[float, model_config.RopeScaling | None]:
  """The rotary base and its scaling."""
  values = json.get("rope_parameters", None) or json.get("rope_scaling", {})
  if not isinstance(values, dict):
    raise errors.CheckpointError(
      f"{json.where}: the rope parameters are {values!r}, expected an object"
    )
  rope = _Json(values, f"{json.where}: rope parameters")
  theta = rope.number("rope_theta", json.number("rope_theta", 10_000.0))
  for source in (json, rope):
    partial = source.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
      raise errors.CheckpointError(
        f"{source.where}: partial_rotary_factor is {partial}, expected 1.0"
      )
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in _SCALING_KEYS:
    raise errors.CheckpointError(
      f"{rope.where}: rope_type {kind!r} is unknown; expected one of "
      f"{', '.join(_SCALING_KEYS)}"
    )
  if kind == "default":
    return theta, None
  common = {"rope_type", "type", "rope_theta", "factor"}
  common.add("partial_rotary_factor")
  given = {key for key, value in values.items() if value is not None}
  unknown = sorted(given - common - _SCALING_KEYS[kind])
  if unknown:
    raise errors.CheckpointError(
      f"{rope.where}: {', '.join(unknown)}: unknown to rope_type {kind!r}"
    )
  return theta, _scaling_from_json(kind, rope, json)


def _scaling_from_json(
  kind: str, rope: _Json, json: _Json
) -> model_config.RopeScaling:
  factor = rope.number("factor")
  trained = "original_max_position_embeddings"
  context = rope.integer(trained, json.integer("max_position_embeddings"))
  if kind == "linear":
    return model_config.RopeScaling(kind, factor, context)
  if kind == "llama3":
    return model_config.RopeScaling(
      kind,
      factor,
      rope.integer(trained),
      low_freq_factor=rope.number("low_freq_factor"),
      high_freq_factor=rope.number("high_freq_factor"),
    )
  attention = rope.get("attention_factor", None)
  return model_config.RopeScaling(
    kind,
    factor,
    context,
    beta_fast=rope.number("beta_fast", 32.0),
    beta_slow=rope.number("beta_slow", 1.0),
    attention_factor=(
      None if attention is None else rope.number("attention_factor")
    ),
  )


def _scaling_to_json(scaling: model_config.RopeScaling) -> dict[str, Any]:
  values: dict[str, Any] = {
    "rope_type": scaling.kind,
    "factor": scaling.factor,
  }
  if scaling.kind == "linear":
    return values
  values["original_max_position_embeddings"] = scaling.original_context
  if scaling.kind == "llama3":
    values["low_freq_factor"] = scaling.low_freq_factor
    values["high_freq_factor"] = scaling.high_freq_factor
    return values
  values["beta_fast"] = scaling.beta_fast
  values["beta_slow"] = scaling.beta_slow
  if scaling.attention_factor is not None:
    values["attention_factor"] = scaling.attention_factor
  return values
