"""What a request may ask of an engine."""

import dataclasses

import pytest

from forge_jax import errors
from forge_jax.engine import api

CHANGES = {
  "temperature": 0.7,
  "top_k": 5,
  "top_p": 0.9,
  "min_p": 0.1,
  "presence_penalty": 0.5,
  "frequency_penalty": -0.5,
  "repetition_penalty": 1.1,
  "logit_bias": ((3, 1.0),),
  "grammar": "start: /a/",
}
NEUTRAL = {
  "max_tokens": 7,
  "seed": 3,
  "stop_token_ids": (1,),
  "stop_strings": ("a",),
  "top_logprobs": 2,
}


def request(**sampling):
  return api.GenerateRequest(
    "r", (1,), api.SamplingParams(**{"max_tokens": 1, **sampling})
  )


def test_a_prompt_may_be_any_sequence_of_ids():
  for ids in ((1, 2), [1, 2], range(1, 3)):
    asked = api.GenerateRequest("r", ids, api.SamplingParams(max_tokens=1))
    assert asked.prompt_ids.tolist() == [1, 2]
    assert asked.prompt_ids.dtype == "int32"
  with pytest.raises(errors.EngineError, match="does not fit 32 bits"):
    api.GenerateRequest("r", (2**31,), api.SamplingParams(max_tokens=1))


def test_plain_is_what_changes_no_distribution():
  fields = {f.name for f in dataclasses.fields(api.SamplingParams)}
  assert fields == CHANGES.keys() | NEUTRAL.keys()
  assert request(**NEUTRAL).sampling.plain
  for name, value in CHANGES.items():
    assert not request(**{name: value}).sampling.plain, name


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_is_set_is_refused_by_name(name):
  with pytest.raises(errors.EngineError, match=f"r: {name}="):
    api.refuse(request(**{name: CHANGES[name]}), *CHANGES)


def test_defaults_are_never_refused():
  api.refuse(request(), *CHANGES)
