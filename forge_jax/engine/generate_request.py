"""The body of SGLang's `/generate`, to and from an engine's requests.

Names are SGLang's, of its `GenerateReqInput` and `SamplingParams`; a session is
its `routing_key`. A body that asks for what this engine has not is refused, not
half served.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import secrets
from typing import Any

from forge_jax import errors
from forge_jax.engine import api

_MAX_NEW_TOKENS = 128  # SGLang's default
_MOST_PRIORITY = 2**31 - 1
_NEUTRAL = {  # what SGLang has and we have not may be sent if it does nothing
  "min_new_tokens": 0,
  "regex": None,
  "structural_tag": None,
}
_NEUTRAL_IN_BODY = {
  "logprob_start_len": -1,
  "return_hidden_states": False,
  "return_routed_experts": False,
}
_SAME = {  # sampling parameters of one name: default, least, most
  "temperature": (1.0, 0.0, 100.0),
  "top_p": (1.0, 0.0, 1.0),
  "min_p": (0.0, 0.0, 1.0),
  "presence_penalty": (0.0, -2.0, 2.0),
  "frequency_penalty": (0.0, -2.0, 2.0),
  "repetition_penalty": (1.0, 0.01, 2.0),
}
# They shape the text of a reply, and our replies have ids only.
_OF_TEXT = (
  "skip_special_tokens",
  "spaces_between_special_tokens",
  "no_stop_trim",
  "stream_interval",
)
_IGNORED = (  # of a request's body, likewise
  "return_text_in_logprobs",
  "return_output_logprob_only",
  "background",
  "log_metrics",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Generate:
  """What the body of a `/generate` request asks for."""

  requests: tuple[api.GenerateRequest, ...]
  single: bool  # the reply is one object, not a list of them
  stream: bool
  logprobs: bool  # whether the reply has them


def turn_to_json(request: api.GenerateRequest) -> dict[str, Any]:
  """The fields of a body that say whose turn a request is; none by default."""
  value: dict[str, Any] = {}
  if request.session:
    value["routing_key"] = request.session
  if request.priority:
    value["priority"] = request.priority
  return value


def sampling_to_json(sampling: api.SamplingParams) -> dict[str, Any]:
  """A request's `sampling_params`; `top_logprobs` is the body's to hold."""
  value = {name: getattr(sampling, name) for name in _SAME}
  value |= {
    "max_new_tokens": sampling.max_tokens,
    "top_k": sampling.top_k or -1,
    "sampling_seed": sampling.seed,
    "stop_token_ids": list(sampling.stop_token_ids),
    "stop": list(sampling.stop_strings),
    # Ids are what counts; stop strings stay in the text, as they do in them.
    "skip_special_tokens": False,
    "no_stop_trim": True,
  }
  if sampling.logit_bias:
    value["logit_bias"] = {str(id): bias for id, bias in sampling.logit_bias}
  if sampling.grammar is not None:
    value["ebnf"] = sampling.grammar  # which llguidance reads as Lark, too
  return value


def sampling_from_json(
  value: Any, eos_token_ids: Sequence[int] = ()
) -> tuple[api.SamplingParams, int]:
  """Parses `sampling_params`.

  Args:
    value: the JSON; None stands for no parameters.
    eos_token_ids: the model's; they end a reply unless `ignore_eos`, which as
      in SGLang takes away `stop_token_ids` too.

  Returns:
    The parameters, and `n`, how many replies are asked for.

  Raises:
    EngineError: a parameter is unknown, or out of its range.
  """
  given = {} if value is None else value
  if not isinstance(given, Mapping):
    raise errors.EngineError("sampling_params: must be an object")
  given = {key: item for key, item in given.items() if item is not None}
  take = _Taker(given, "sampling_params.")
  stops = take.ids("stop_token_ids")
  ignore_eos = take.boolean("ignore_eos", False)
  sampling = api.SamplingParams(
    max_tokens=take.integer("max_new_tokens", _MAX_NEW_TOKENS, 1),
    top_k=max(0, take.integer("top_k", -1, -1)),
    logit_bias=take.bias("logit_bias"),
    grammar=take.grammar(),
    seed=take.integer("sampling_seed", secrets.randbits(31), 0),
    stop_token_ids=() if ignore_eos else (*stops, *eos_token_ids),
    stop_strings=take.strings("stop"),
    **{name: take.number(name, *range) for name, range in _SAME.items()},
  )
  count = take.integer("n", 1, 1)
  take.refuse_others(_OF_TEXT, _NEUTRAL)
  return sampling, count


def parse_generate(
  body: Any, max_context: int, eos_token_ids: Sequence[int] = ()
) -> Generate:
  """Parses the body of a `/generate` request.

  Args:
    body: the JSON.
    max_context: of the engine; a reply gets no more tokens than fit.
    eos_token_ids: see `sampling_from_json`.

  Raises:
    EngineError: the body is malformed or asks for what there is not.
  """
  if not isinstance(body, Mapping):
    raise errors.EngineError("the body must be a JSON object")
  given = {key: item for key, item in body.items() if item is not None}
  take = _Taker(given, "")
  if "text" in given:
    raise errors.EngineError(
      "text: this server takes input_ids, as SGLang does with "
      "--skip-tokenizer-init"
    )
  stream = take.boolean("stream", False)
  top = take.integer("top_logprobs_num", 0, 0, api.MOST_TOP_LOGPROBS)
  session = take.string("routing_key")
  priority = take.integer("priority", 0, -_MOST_PRIORITY, _MOST_PRIORITY)
  take.refuse_others(
    ("rid", "input_ids", "sampling_params", "return_logprob", *_IGNORED),
    _NEUTRAL_IN_BODY,
  )
  prompts, single = _prompts(given.get("input_ids"))
  logprobs = _for_each(given.get("return_logprob", False), len(prompts))
  if not all(isinstance(one, bool) for one in logprobs):
    raise errors.EngineError("return_logprob: must be true or false")
  asked = [
    sampling_from_json(one, eos_token_ids)
    for one in _for_each(given.get("sampling_params"), len(prompts))
  ]
  count = asked[0][1]
  if any(other != count for _, other in asked):
    raise errors.EngineError("sampling_params.n: must be the same for all")
  single = single and count == 1
  rids = _rids(given.get("rid"), len(prompts) * count, single)
  requests = []
  for prompt, (sampling, _) in zip(prompts, asked, strict=True):
    room = max(1, max_context - len(prompt))
    for number in range(count):
      each = dataclasses.replace(
        sampling,
        seed=sampling.seed + number,
        max_tokens=min(sampling.max_tokens, room),
        top_logprobs=top,
      )
      rid = rids[len(requests)]
      requests.append(api.GenerateRequest(rid, prompt, each, session, priority))
  return Generate(tuple(requests), single, stream, any(logprobs))


class _Taker:
  """Takes values out of a JSON object, checking each."""

  def __init__(self, given: Mapping[str, Any], prefix: str):
    self._given, self._prefix = given, prefix
    self._known: set[str] = set()

  def boolean(self, name: str, default: bool) -> bool:
    value = self._take(name, default)
    if not isinstance(value, bool):
      raise self._bad(name, "true or false", value)
    return value

  def integer(
    self, name: str, default: int, low: int, high: int = 2**63 - 1
  ) -> int:
    value = self._take(name, default)
    if type(value) is not int or not low <= value <= high:
      raise self._bad(name, f"an integer from {low} to {high}", value)
    return value

  def number(self, name: str, default: float, low: float, high: float) -> float:
    value = self._take(name, default)
    if type(value) not in (int, float) or not low <= value <= high:
      raise self._bad(name, f"a number from {low:g} to {high:g}", value)
    return float(value)

  def string(self, name: str) -> str:
    value = self._take(name, "")
    if not isinstance(value, str):
      raise self._bad(name, "a string", value)
    return value

  def ids(self, name: str) -> tuple[int, ...]:
    value = self._take(name, [])
    if not _is_ids(value):
      raise self._bad(name, "a list of token ids", value)
    return tuple(value)

  def bias(self, name: str) -> tuple[tuple[int, float], ...]:
    value = self._take(name, {})
    if not isinstance(value, Mapping) or not all(
      str(id).isdigit() and type(bias) in (int, float)
      for id, bias in value.items()
    ):
      raise self._bad(name, "an object of token ids and numbers", value)
    return tuple((int(id), float(bias)) for id, bias in value.items())

  def grammar(self) -> str | None:
    """The grammar that `ebnf` or `json_schema` gives."""
    ebnf, schema = self._take("ebnf", None), self._take("json_schema", None)
    for name, value in (("ebnf", ebnf), ("json_schema", schema)):
      if not isinstance(value, str | None):
        raise self._bad(name, "a string", value)
    if ebnf is not None and schema is not None:
      raise errors.EngineError(
        f"{self._prefix}ebnf and {self._prefix}json_schema exclude each other"
      )
    return ebnf if schema is None else f"start: %json {schema}"

  def strings(self, name: str) -> tuple[str, ...]:
    value = self._take(name, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(
      isinstance(item, str) and item for item in value
    ):
      raise self._bad(name, "a string or a list of strings", value)
    return tuple(value)

  def refuse_others(
    self, ignored: Sequence[str], neutral: Mapping[str, Any]
  ) -> None:
    """Raises EngineError for keys that were not taken and that do something."""
    for name, value in self._given.items():
      if name in self._known or name in ignored:
        continue
      if name not in neutral or value != neutral[name]:
        raise errors.EngineError(
          f"{self._prefix}{name}={value!r:.80}: this engine does not have it"
        )

  def _take(self, name: str, default: Any) -> Any:
    self._known.add(name)
    return self._given.get(name, default)

  def _bad(self, name: str, expected: str, value: Any) -> errors.EngineError:
    return errors.EngineError(
      f"{self._prefix}{name}: must be {expected}, not {value!r:.80}"
    )


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and all(type(item) is int for item in value)


def _prompts(value: Any) -> tuple[list[list[int]], bool]:
  """The prompts, and whether one was given without a list around it."""
  if not isinstance(value, list) or not value:
    raise errors.EngineError("input_ids: a list of token ids is required")
  if _is_ids(value):
    return [value], True
  if not all(_is_ids(item) and item for item in value):
    raise errors.EngineError(
      "input_ids: must be a list of token ids, or a list of such lists"
    )
  return value, False


def _for_each(value: Any, count: int) -> list[Any]:
  """A parameter of each prompt: one value for all, or a list of them."""
  if not isinstance(value, list):
    return [value] * count
  if len(value) != count:
    raise errors.EngineError(f"{len(value)} values for {count} prompts")
  return value


def _rids(value: Any, count: int, single: bool) -> list[str]:
  if value is None:
    return [secrets.token_hex(16) for _ in range(count)]
  if isinstance(value, str) and value:
    return [value] if single else [f"{value}_{i}" for i in range(count)]
  if (
    isinstance(value, list)
    and len(set(map(str, value))) == count == len(value)
    and all(isinstance(item, str) and item for item in value)
  ):
    return value
  raise errors.EngineError(
    f"rid: must be a string or a list of {count} distinct strings"
  )
