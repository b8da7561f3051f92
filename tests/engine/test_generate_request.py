"""The body of /generate: round trips, defaults, and what is refused."""

import dataclasses
import json

import pytest

from forge_jax import errors
from forge_jax.engine import api, generate_request

FULL = api.SamplingParams(
  max_tokens=9,
  temperature=0.7,
  top_k=5,
  top_p=0.9,
  min_p=0.05,
  presence_penalty=0.5,
  frequency_penalty=-0.25,
  repetition_penalty=1.1,
  logit_bias=((3, -2.0), (8, 1.5)),
  grammar='start: "a"+',
  seed=11,
  stop_token_ids=(2, 4),
  stop_strings=("stop", "\n\n"),
  top_logprobs=3,
)


def parse(body, max_context=100, eos=()):
  return generate_request.parse_generate(body, max_context, eos)


def test_every_sampling_parameter_survives_the_way():
  for field in dataclasses.fields(FULL):  # so that none is forgotten here
    if field.default is not dataclasses.MISSING:
      assert getattr(FULL, field.name) != field.default, field.name
  for sampling in (FULL, api.SamplingParams(max_tokens=4)):
    body = {
      "input_ids": [1],
      "sampling_params": generate_request.sampling_to_json(sampling),
      "top_logprobs_num": sampling.top_logprobs,
    }
    [request] = parse(json.loads(json.dumps(body))).requests
    assert request.sampling == sampling


def test_the_defaults_are_sglangs():
  asked = parse({"input_ids": [1, 2]})
  [request] = asked.requests
  assert request.prompt_ids.tolist() == [1, 2] and request.id
  assert request.sampling == api.SamplingParams(
    max_tokens=98, seed=request.sampling.seed
  )
  assert asked.single and not asked.stream and not asked.logprobs
  [request] = parse({"input_ids": [1]}, max_context=1000).requests
  assert request.sampling.max_tokens == 128
  seeds = {parse({"input_ids": [1]}).requests[0].sampling.seed for _ in "ab"}
  assert len(seeds) == 2


def test_a_batch_has_parameters_for_all_or_for_each():
  asked = parse(
    {
      "input_ids": [[1], [2, 3]],
      "rid": "r",
      "return_logprob": [True, True],
      "sampling_params": [{"max_new_tokens": 3}, {"temperature": 0}],
    }
  )
  assert [r.id for r in asked.requests] == ["r_0", "r_1"]
  assert [r.sampling.max_tokens for r in asked.requests] == [3, 98]
  assert [r.sampling.temperature for r in asked.requests] == [1.0, 0.0]
  assert not asked.single and asked.logprobs
  one = parse({"input_ids": [[1]], "sampling_params": {"n": 1}})
  assert not one.single and len(one.requests) == 1


def test_several_replies_to_one_prompt_differ_in_their_seeds():
  asked = parse(
    {
      "input_ids": [5],
      "rid": "r",
      "sampling_params": {"n": 3, "sampling_seed": 4},
    }
  )
  assert [r.sampling.seed for r in asked.requests] == [4, 5, 6]
  assert [r.id for r in asked.requests] == ["r_0", "r_1", "r_2"]
  assert not asked.single


def test_the_models_end_of_sequence_ends_a_reply_unless_ignored():
  body = {"input_ids": [1], "sampling_params": {"stop_token_ids": [7]}}
  assert parse(body, eos=(2,)).requests[0].sampling.stop_token_ids == (7, 2)
  body["sampling_params"]["ignore_eos"] = True
  assert parse(body, eos=(2,)).requests[0].sampling.stop_token_ids == ()


def test_a_json_schema_is_a_grammar():
  body = {"input_ids": [1], "sampling_params": {"json_schema": "{}"}}
  assert parse(body).requests[0].sampling.grammar == "start: %json {}"


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ([], "the body must be a JSON object"),
    ({}, "input_ids: a list of token ids is required"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": "12"}, "input_ids"),
    ({"input_ids": [1, True]}, "input_ids"),
    ({"input_ids": [1, 2.0]}, "input_ids"),
    ({"input_ids": [[1], []]}, "input_ids"),
    ({"text": "hi"}, "text: this server takes input_ids"),
    ({"input_ids": [1], "stream": 1}, "stream: must be true or false"),
    ({"input_ids": [1], "lora_path": "x"}, "lora_path='x'"),
    ({"input_ids": [1], "rid": 3}, "rid"),
    ({"input_ids": [2**31]}, "does not fit 32 bits"),
    ({"input_ids": [1], "routing_key": 3}, "routing_key: must be a string"),
    ({"input_ids": [1], "priority": "high"}, "priority: must be an integer"),
    ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "rid"),
    ({"input_ids": [1], "return_logprob": "yes"}, "return_logprob"),
    ({"input_ids": [1], "return_logprob": [True, False]}, "2 values for 1"),
    ({"input_ids": [1], "top_logprobs_num": 21}, "from 0 to 20"),
    ({"input_ids": [1], "logprob_start_len": 0}, "logprob_start_len=0"),
    ({"input_ids": [1], "sampling_params": 3}, "sampling_params"),
  ],
)
def test_a_bad_body_is_refused_by_name(body, message):
  with pytest.raises(errors.EngineError, match=message):
    parse(body)


@pytest.mark.parametrize(
  ("sampling", "message"),
  [
    ({"max_new_tokens": 0}, "sampling_params.max_new_tokens: must be an int"),
    ({"max_new_tokens": True}, "max_new_tokens"),
    ({"temperature": -1}, "temperature: must be a number from 0 to 100"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"sampling_seed": -1}, "sampling_seed"),
    ({"stop_token_ids": 3}, "stop_token_ids: must be a list of token ids"),
    ({"stop": [""]}, "stop: must be a string or a list of strings"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"ebnf": "x", "json_schema": "{}"}, "exclude each other"),
    ({"ebnf": 3}, "ebnf: must be a string"),
    ({"regex": "a+"}, r"regex='a\+': this engine does not have it"),
    ({"min_new_tokens": 2}, "min_new_tokens=2"),
    ({"tempreature": 1}, "tempreature=1: this engine does not have it"),
    ({"n": 0}, "n: must be an integer from 1"),
    ({"ignore_eos": 1}, "ignore_eos"),
  ],
)
def test_a_bad_sampling_parameter_is_refused_by_name(sampling, message):
  with pytest.raises(errors.EngineError, match=message):
    parse({"input_ids": [1], "sampling_params": sampling})
