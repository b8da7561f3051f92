"""Grammars, penalties, biases and alternatives in the built-in engine."""

import asyncio
import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from forge_jax import errors, types
from forge_jax.engine import (
  api,
  batch,
  config,
  engine,
  grammar,
  runner,
  sampling,
)
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp

STOP = 256
SCHEMA = {
  "type": "object",
  "properties": {
    "city": {"type": "string", "maxLength": 6},
    "sights": {
      "type": "array",
      "items": {"enum": ["bridge", "tower"]},
      "maxItems": 2,
    },
    "area": {"type": "integer", "minimum": 0, "maximum": 900},
  },
  "required": ["city", "sights", "area"],
  "additionalProperties": False,
}
JSON = "start: %json " + json.dumps(
  {**SCHEMA, "x-guidance": {"whitespace_pattern": " ?"}}
)


CONFIG = config.EngineConfig(
  slots=8,
  context=256,
  decode_rows=(8,),
  prefill_rows=(4,),
  prefill_chunk=16,
  row_multiple=8 + 4 * 16,  # steps of one size: the same to the last bit
  warm_shaped=True,
)


@pytest.fixture(scope="module")
def grammars(byte_tokenizer):
  return grammar.Grammars(byte_tokenizer, 260)


@pytest.fixture(scope="module")
def running(byte_tokenizer, byte_decoder, grammars):
  made = engine.JaxEngine(
    byte_decoder,
    CONFIG,
    decode_text=byte_tokenizer.decode,
    grammars=grammars,
  )
  made.start()
  yield made
  made.stop()


def request(name, *, prompt=(1, 2, 3), **sampling):
  sampling = {
    "max_tokens": 200,
    "stop_token_ids": (STOP,),
    "seed": 3,
    **sampling,
  }
  return api.GenerateRequest(
    name, tuple(prompt), api.SamplingParams(**sampling)
  )


async def collect(made, req):
  """Returns (token ids, log-probabilities, alternatives, stop reason)."""
  chunks = [chunk async for chunk in made.generate(req)]
  join = lambda name: [x for c in chunks for x in getattr(c, name)]
  return (
    join("token_ids"),
    join("logprobs"),
    join("top_logprobs"),
    chunks[-1].stop_reason,
  )


def dense_logits(model, prompt, response):
  """The model's logits before each token of a response, [R, V]."""
  ids = jnp.asarray([[*prompt, *response]])
  logits = decoder_lib.causal_logits(model, ids)[0]
  return np.asarray(logits)[len(prompt) - 1 : -1]


def log_softmax(logits):
  return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


async def test_responses_follow_their_schema(running, byte_tokenizer):
  replies = await asyncio.gather(
    *(
      collect(running, request(f"json{i}", grammar=JSON, seed=i))
      for i in range(12)
    )
  )
  for ids, _, _, reason in replies:
    assert reason == types.StopReason.STOP and ids[-1] == STOP
    jsonschema.validate(json.loads(byte_tokenizer.decode(ids[:-1])), SCHEMA)
  assert len({tuple(ids) for ids, *_ in replies}) == 12


async def test_logprobs_are_those_of_the_masked_distribution(
  running, byte_decoder, grammars
):
  asked = request("masked", grammar=JSON, temperature=0.7, top_logprobs=4)
  ids, logprobs, tops, _ = await collect(running, asked)
  logits = dense_logits(byte_decoder, asked.prompt_ids, ids) / 0.7
  progress = grammars.start(JSON, [STOP])
  for row, token in enumerate(ids):
    bits = np.unpackbits(progress.allowed.view(np.uint8), bitorder="little")
    expected = log_softmax(np.where(bits[:260], logits[row], -np.inf))
    np.testing.assert_allclose(logprobs[row], expected[token], atol=1e-4)
    best = np.sort(expected)[::-1][:4]
    np.testing.assert_allclose(
      [p for _, p in tops[row]], best[best > -np.inf], atol=1e-4
    )
    if token != STOP:
      grammar.advance([progress], [token])


async def test_penalties_and_bias_at_every_token(running, byte_decoder):
  asked = request(
    "edited",
    prompt=[7, 8, 7, 9],
    max_tokens=40,
    presence_penalty=0.8,
    frequency_penalty=0.4,
    repetition_penalty=1.4,
    logit_bias=((65, 6.0), (7, 4.0)),
  )
  ids, logprobs, _, _ = await collect(running, asked)
  assert len(set(ids)) < len(ids)  # something was penalised
  logits = dense_logits(byte_decoder, asked.prompt_ids, ids)
  for row, token in enumerate(ids):
    reference, said = logits[row].copy(), ids[:row]
    for t in {*asked.prompt_ids, *said}:
      reference[t] *= 1 / 1.4 if reference[t] > 0 else 1.4
    for t in set(said):
      reference[t] -= 0.8 + 0.4 * said.count(t)
    reference[65] += 6
    reference[7] += 4
    np.testing.assert_allclose(
      logprobs[row], log_softmax(reference)[token], atol=1e-4
    )


async def test_greedy_takes_the_likeliest_allowed(running, byte_decoder):
  asked = request(
    "greedy", grammar="start: /[a-d]{9}/", temperature=0.0, min_p=0.5
  )
  ids, *_ = await collect(running, asked)
  logits = dense_logits(byte_decoder, asked.prompt_ids, ids)
  letters = [id for id in range(260) if id in ids[:-1]]
  for row, token in enumerate(ids[:-1]):
    assert logits[row, token] >= logits[row, letters].max()


async def test_plain_neighbours_are_the_same_and_nothing_recompiles(running):
  compiled = running.compilations
  plain = [request(f"p{i}", max_tokens=30, seed=i) for i in range(3)]
  alone = await asyncio.gather(*(collect(running, one) for one in plain))
  mixed = [
    request("m0", grammar=JSON),
    request("m1", presence_penalty=1.0, max_tokens=30),
    request("m2", top_logprobs=2, max_tokens=30),
  ]
  again = [request(f"q{i}", max_tokens=30, seed=i) for i in range(3)]
  mixed.append(request("m3", top_k=5, top_p=0.9, max_tokens=30))
  beside = await asyncio.gather(
    *(collect(running, one) for one in (*again, *mixed))
  )
  assert beside[:3] == alone
  assert running.compilations == compiled


async def test_drafts_change_nothing_under_a_grammar(
  running, byte_tokenizer, byte_decoder, grammars
):
  made = engine.JaxEngine(
    mtp.grow(byte_decoder, 1, rngs=nnx.Rngs(params=1)),
    dataclasses.replace(running.config, draft_tokens=2, draft_adaptive=False),
    decode_text=byte_tokenizer.decode,
    grammars=grammars,
  )
  made.start()
  try:
    asked = [
      request(
        f"drafts{n}", grammar=JSON, seed=n, temperature=0.5, top_logprobs=1
      )
      for n in range(4)
    ]
    asked.append(request("penalty", frequency_penalty=0.3, max_tokens=40))
    plain, drafted = [
      await asyncio.gather(*(collect(some, one) for one in asked))
      for some in (running, made)
    ]
    stats = made.stats()
    assert 0 < stats["accepted_tokens"] < stats["drafted_tokens"]
    for one, other in zip(plain, drafted, strict=True):
      assert one[0] == other[0] and one[3] == other[3]
      np.testing.assert_allclose(one[1], other[1], atol=1e-4)
  finally:
    made.stop()


def test_a_plain_row_is_sampled_by_the_same_program_in_any_company(
  byte_decoder,
):
  made = runner.Runner(byte_decoder, CONFIG)
  rows = [batch.Row((n + 1,), (1, 2 + n), 0, n, 1.0, 0, 1.0) for n in range(12)]
  one = np.ones(1, np.float32)
  shape = sampling.Shape(np.array([65], np.int32), one, 6 * one)
  for n in range(0, 12, 3):
    plain = rows[n : n + 3]
    other = dataclasses.replace(rows[n - 1], shapes=lambda _: [shape])
    [[alone]] = made.run([], plain)
    [[beside]] = made.run([], [*plain, other])
    for name in ("token_R", "logprob_R"):
      np.testing.assert_array_equal(
        getattr(alone, name), getattr(beside, name)[:3]
      )


async def test_a_budget_ends_json_early(running, byte_tokenizer):
  ids, *_, reason = await collect(
    running, request("short", grammar=JSON, max_tokens=9)
  )
  assert reason == types.StopReason.LENGTH and len(ids) == 9
  assert byte_tokenizer.decode(ids).lstrip().startswith("{")


@pytest.mark.parametrize(
  ("sampling", "message"),
  [
    ({"grammar": "start: x"}, 'unknown name: "x"'),
    ({"grammar": "start: /a/", "stop_token_ids": ()}, "stop token"),
    ({"min_p": 1.5}, "min_p=1.5"),
    ({"top_p": -0.1}, "top_p=-0.1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"top_logprobs": 21}, "top_logprobs=21"),
    ({"logit_bias": ((260, 1.0),)}, "260 is outside the vocabulary"),
    ({"logit_bias": ((1, float("inf")),)}, "logit_bias of token 1"),
  ],
)
async def test_what_cannot_be_is_refused_by_name(running, sampling, message):
  with pytest.raises(errors.EngineError, match=message):
    await collect(running, request("bad", **sampling))
  ids, *_ = await collect(running, request("good", max_tokens=2))
  assert len(ids) == 2


async def test_a_grammar_that_fails_on_the_way_ends_its_request_only(
  running, monkeypatch
):
  real, calls = grammar.advance, []

  def fail(progresses, tokens):
    real(progresses, tokens)
    calls.extend(progresses)
    if progresses and len(calls) == 5:
      progresses[0].error = "the parser is too complex"

  monkeypatch.setattr(grammar, "advance", fail)
  bad, good = await asyncio.gather(
    collect(running, request("bad", grammar="start: /a{50}/")),
    collect(running, request("good", max_tokens=30)),
    return_exceptions=True,
  )
  assert isinstance(bad, errors.GrammarError) and "too complex" in str(bad)
  assert len(good[0]) == 30


def test_a_grammar_needs_a_tokenizer(byte_decoder):
  made = engine.JaxEngine(
    byte_decoder,
    config.EngineConfig(
      slots=2, context=64, decode_rows=(2,), prefill_rows=(2,)
    ),
  )
  with pytest.raises(errors.EngineError, match="grammar needs an engine"):
    asyncio.run(collect(made, request("r", grammar="start: /a/")))
