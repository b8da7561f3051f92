import contextlib

import pytest

from forge_jax import errors, types
from forge_jax.engine import api, scripted


def request(id="r", prompt=(1, 2), **sampling):
  return api.GenerateRequest(
    id, tuple(prompt), api.SamplingParams(**{"max_tokens": 50, **sampling})
  )


async def collect(engine, asked):
  """Returns (tokens, logprobs, versions, stop reason)."""
  tokens, logprobs, versions, reasons = [], [], [], []
  async with contextlib.aclosing(engine.generate(asked)) as chunks:
    async for chunk in chunks:
      tokens += chunk.token_ids
      logprobs += chunk.logprobs
      versions += chunk.versions
      reasons.append(chunk.stop_reason)
  assert all(r is None for r in reasons[:-1])
  return tokens, logprobs, versions, reasons[-1]


@pytest.mark.parametrize("delay", [0.0, 0.0001])
@pytest.mark.parametrize(
  ("sampling", "expected", "reason"),
  [
    ({}, [5, 6, 7, 8], "length"),
    ({"stop_token_ids": (7, 9)}, [5, 6, 7], "stop"),
    ({"max_tokens": 2}, [5, 6], "length"),
    ({"max_tokens": 3, "stop_token_ids": (7,)}, [5, 6, 7], "stop"),
    ({"stop_strings": ("67",)}, [5, 6, 7], "stop"),
  ],
)
async def test_budgets_and_stops(delay, sampling, expected, reason):
  engine = scripted.ScriptedEngine(
    lambda _: [5, 6, 7, 8],
    delay=delay,
    decode=lambda ids: "".join(map(str, ids)),
  )
  tokens, logprobs, versions, why = await collect(engine, request(**sampling))
  assert (tokens, why) == (expected, types.StopReason(reason))
  assert len(logprobs) == len(versions) == len(tokens)
  assert all(-1 <= p < 0 for p in logprobs)


async def test_logprobs_depend_on_the_seed_alone():
  engine = scripted.ScriptedEngine(lambda _: [5, 6, 7])
  one = await collect(engine, request(seed=1))
  assert one == await collect(engine, request("other", seed=1))
  assert one[1] != (await collect(engine, request(seed=2)))[1]


async def test_an_abort_yields_a_last_chunk():
  engine = scripted.ScriptedEngine(lambda _: range(100), delay=0.0001)
  chunks = engine.generate(request())
  first = await anext(chunks)
  engine.abort("r")
  engine.abort("unknown")
  last = await anext(chunks)
  assert first.token_ids == (0,)
  assert (last.token_ids, last.stop_reason) == ((), types.StopReason.ABORT)
  assert engine.stats()["aborted"] == 1
  with pytest.raises(StopAsyncIteration):
    await anext(chunks)


async def test_weights_change_under_a_running_request():
  engine = scripted.ScriptedEngine(lambda _: [5, 6], delay=0.0001)
  chunks = engine.generate(request())
  assert (await anext(chunks)).versions == (0,)
  engine.update_weights(types.WeightsVersion(3, params={}))
  assert (await anext(chunks)).versions == (3,)
  await chunks.aclose()
  assert engine.stats()["running"] == 0


async def test_what_is_refused():
  engine = scripted.ScriptedEngine(lambda _: [5], max_context=4)
  with pytest.raises(errors.ContextOverflowError, match=r"4 tokens.*holds 4"):
    await collect(engine, request(prompt=range(4)))
  with pytest.raises(errors.EngineError, match="max_tokens=0"):
    await collect(engine, request(max_tokens=0))
  with pytest.raises(errors.EngineError, match="decode"):
    await collect(engine, request(stop_strings=("x",)))


async def test_alternatives_begin_with_the_sampled_token():
  engine = scripted.ScriptedEngine(lambda _: [5, 1])
  async for chunk in engine.generate(request(top_logprobs=3)):
    tops = chunk.top_logprobs
    assert [[token for token, _ in top] for top in tops] == [
      [5, 4, 3],
      [1, 0, 3],
    ]
    assert tuple(top[0][1] for top in tops) == chunk.logprobs
    for top in tops:
      assert sorted(top, key=lambda one: -one[1]) == list(top)


async def test_a_grammar_is_refused_by_name():
  engine = scripted.ScriptedEngine(lambda _: [5])
  with pytest.raises(errors.EngineError, match="grammar='start: "):
    await collect(engine, request(grammar='start: "a"'))


async def test_a_script_must_be_of_the_grammar():
  asked = []

  def follows(grammar, tokens, whole):
    asked.append((grammar, tokens, whole))
    return 6 not in tokens

  engine = scripted.ScriptedEngine(lambda r: r.prompt_ids, follows=follows)
  stop = {"grammar": "g", "stop_token_ids": (9,)}
  out = await collect(engine, request(prompt=(5, 9), **stop))
  assert out[0] == [5, 9]
  await collect(engine, request(prompt=(5, 7), **stop))
  assert asked == [("g", (5,), True), ("g", (5, 7), False)]
  with pytest.raises(errors.EngineError, match=r"\(5, 6\) is not of"):
    await collect(engine, request(prompt=(5, 6), **stop))
