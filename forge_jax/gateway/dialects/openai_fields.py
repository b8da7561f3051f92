"""Parameters that several of OpenAI's protocols have."""

from collections.abc import Collection, Mapping
import typing
from typing import Any

from openai.types import shared

from forge_jax.engine import api
from forge_jax.gateway import refusal
from forge_jax.gateway.dialects import fields

MOST_CHOICES = 128
_EFFORTS = typing.get_args(typing.get_args(shared.ReasoningEffort)[0])


def checked(
  body: Any, known: Collection[str], neutral: Mapping[str, Any]
) -> dict[str, Any]:
  """The parameters that are not null.

  Args:
    body: any JSON value.
    known: names of the parameters that are honoured or ignored.
    neutral: parameters that are not supported, but for the one value that asks
      for nothing.

  Raises:
    Refusal: the body is no object, or has another parameter.
  """
  if not isinstance(body, dict):
    raise refusal.Refusal("the body must be a JSON object")
  body = {name: value for name, value in body.items() if value is not None}
  for name, value in body.items():
    if name in neutral:
      if value != neutral[name]:
        raise fields.bad(name, f"only {neutral[name]!r} is supported")
    elif name not in known:
      raise fields.bad(name, "this parameter is not supported")
  return body


def stop(body: dict[str, Any]) -> tuple[str, ...]:
  """The strings that end a reply.

  Raises:
    Refusal: they are malformed, or more than four.
  """
  value = body.get("stop", [])
  stop = [value] if isinstance(value, str) else value
  if not isinstance(stop, list) or len(stop) > 4:
    raise fields.bad("stop", "must be a string or a list of at most 4 strings")
  if not all(isinstance(s, str) and s for s in stop):
    raise fields.bad("stop", "a stop string is a non-empty string")
  return tuple(stop)


# What shapes the distribution of each token. The last three are not OpenAI's:
# they are named as SGLang and vLLM name them.
SHAPING = (
  "frequency_penalty",
  "logit_bias",
  "presence_penalty",
  "min_p",
  "repetition_penalty",
  "top_k",
)


def shaping(body: dict[str, Any]) -> dict[str, Any]:
  """The fields of a `generation.Turn` that `SHAPING` gives.

  Raises:
    Refusal: one is malformed or out of bounds.
  """
  frequency = fields.number(body, "frequency_penalty", float, -2, 2)
  presence = fields.number(body, "presence_penalty", float, -2, 2)
  least = api.LEAST_REPETITION_PENALTY
  repetition = fields.number(body, "repetition_penalty", float, least, 2)
  return {
    "frequency_penalty": frequency or 0.0,
    "presence_penalty": presence or 0.0,
    "repetition_penalty": repetition or 1.0,
    "logit_bias": _logit_bias(fields.field(body, "logit_bias", dict, {})),
    "min_p": fields.number(body, "min_p", float, 0, 1),
    "top_k": fields.number(body, "top_k", int, 0, 2**31 - 1),
  }


def _logit_bias(values: dict[str, Any]) -> tuple[tuple[int, float], ...]:
  found = {}
  for token in values:
    if not (token.isascii() and token.isdigit()) or len(token) > 9:
      raise fields.bad("logit_bias", f"{token!r:.40} is not the id of a token")
    if int(token) in found:
      raise fields.bad("logit_bias", f"token {int(token)} is there twice")
    try:
      found[int(token)] = fields.number(values, token, float, -100, 100) or 0.0
    except refusal.Refusal as error:
      raise fields.bad("logit_bias", str(error)) from error
  return tuple(found.items())


def effort(value: Any, where: str) -> str | None:
  """An effort of reasoning, None if absent.

  Raises:
    Refusal: the protocol has no such effort.
  """
  if value is not None and value not in _EFFORTS:
    raise fields.bad(where, f"must be one of {[*_EFFORTS]}, not {value!r:.40}")
  return value


def stream_options(body: dict[str, Any], *names: str) -> dict[str, bool]:
  """The options of a stream, all true or false; of those, the named ones.

  Padding against eavesdroppers, `include_obfuscation`, is never sent.

  Raises:
    Refusal: there is another option, or one is malformed.
  """
  options = fields.field(body, "stream_options", dict, {})
  for name in options:
    if name not in (*names, "include_obfuscation"):
      raise fields.bad(
        f"stream_options.{name}", "this parameter is not supported"
      )
    fields.field(options, name, bool, False, where="stream_options")
  return {name: bool(options.get(name)) for name in names}
