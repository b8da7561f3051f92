"""The built-in engine end to end, on a tiny random model."""

import asyncio
import dataclasses
import itertools
import threading
import time

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import (
  MODEL,
  collect,
  decoder,
  dense_logprobs,
  prompts,
  request,
)

from forge_jax import errors, types
from forge_jax.engine import config, engine
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp

CONFIG = config.EngineConfig(
  slots=8,
  context=64,
  decode_rows=(2, 8),
  prefill_rows=(1, 4),
  prefill_chunk=16,
  prefill_patience=2,
)


@pytest.fixture
def running():
  made = engine.JaxEngine(
    decoder(), CONFIG, decode_text=lambda ids: "".join(f"<{i}>" for i in ids)
  )
  made.start()
  yield made
  made.stop()


async def test_logprobs_are_the_models_own(running):
  some = [*prompts(12), [5] * 3]
  outs = await asyncio.gather(
    *(collect(running, request(str(i), p, seed=i)) for i, p in enumerate(some))
  )
  for prompt, (ids, logprobs, versions, reason) in zip(some, outs, strict=True):
    assert len(ids) == 10 and reason == types.StopReason.LENGTH
    assert versions == [0] * 10
    np.testing.assert_allclose(
      logprobs, dense_logprobs(decoder(), prompt, ids), atol=2e-5
    )


async def test_turns_and_groups_reuse_the_cache_and_stay_exact(running):
  [prompt] = prompts(1, length=33)
  outs = await asyncio.gather(
    *(collect(running, request(f"g{i}", prompt, seed=i)) for i in range(6))
  )
  assert running.stats()["reused_tokens"] == 5 * 32
  ids = outs[0][0]
  longer = prompt + ids + [1, 2, 3]
  again, logprobs, _, _ = await collect(running, request("t2", longer, seed=9))
  assert running.stats()["reused_tokens"] == 5 * 32 + 33 + 9
  np.testing.assert_allclose(
    logprobs, dense_logprobs(decoder(), longer, again), atol=2e-5
  )


async def test_a_flush_forgets_what_was_cached(running):
  [prompt] = prompts(1, length=33)
  first = await collect(running, request("a", prompt))
  running.flush_cache()
  again = await collect(running, request("b", prompt))
  assert running.stats()["reused_tokens"] == 0 and again[:2] == first[:2]


async def test_a_seed_gives_the_same_tokens_in_any_company(running):
  [prompt] = prompts(1)
  alone = await collect(running, request("alone", prompt, seed=5))
  others = [request(f"o{i}", p) for i, p in enumerate(prompts(11, seed=1))]
  crowd = await asyncio.gather(
    *(collect(running, r) for r in [*others, request("x", prompt, seed=5)])
  )
  assert crowd[-1][0] == alone[0]
  different = await collect(running, request("y", prompt, seed=6))
  assert different[0] != alone[0]


async def test_greedy_takes_the_most_likely_token(running):
  [prompt] = prompts(1)
  ids, _, _, _ = await collect(running, request("g", prompt, temperature=0.0))
  logits = decoder_lib.causal_logits(decoder(), jnp.asarray([prompt + ids]))
  expected = np.asarray(logits[0].argmax(-1))[len(prompt) - 1 : -1]
  assert ids == expected.tolist()


async def test_stop_token_stop_string_and_filters(running):
  [prompt] = prompts(1)
  greedy = dict(temperature=0.0)
  ids, _, _, _ = await collect(running, request("a", prompt, **greedy))
  at = next(i for i in range(1, 10) if ids[i] not in ids[:i])
  stopped, _, _, reason = await collect(
    running, request("b", prompt, stop_token_ids=(ids[at],), **greedy)
  )
  assert stopped == ids[: at + 1] and reason == types.StopReason.STOP
  stopped, _, _, reason = await collect(
    running, request("c", prompt, stop_strings=(f"<{ids[at]}>",), **greedy)
  )
  assert stopped == ids[: at + 1] and reason == types.StopReason.STOP
  only, logprobs, _, _ = await collect(
    running, request("d", prompt, top_k=1, seed=11)
  )
  assert only == ids
  np.testing.assert_allclose(logprobs, 0.0, atol=1e-6)


async def test_abort_and_closing_the_iterator_free_the_slot(running):
  [prompt] = prompts(1)
  stream = running.generate(request("a", prompt, max_tokens=40))
  await anext(stream)
  running.abort("a")
  chunks = [chunk async for chunk in stream]
  assert chunks[-1].stop_reason == types.StopReason.ABORT
  stream = running.generate(request("b", prompt, max_tokens=40))
  await anext(stream)
  await stream.aclose()
  deadline = time.monotonic() + 20
  while running.stats()["live"] and time.monotonic() < deadline:
    await asyncio.sleep(0.01)
  assert running.stats()["live"] == 0


async def test_nothing_compiles_after_the_start(running):
  before = running.compilations
  await asyncio.gather(
    *(
      collect(running, request(str(i), p, seed=i))
      for n in (1, 5, 30, 50)
      for i, p in enumerate(prompts(7, length=n), start=10 * n)
    )
  )
  assert running.compilations == before


async def test_bad_requests_are_refused_with_numbers(running):
  with pytest.raises(errors.ContextOverflowError, match="64 tokens"):
    await collect(running, request("a", [1] * 64))
  with pytest.raises(errors.EngineError, match="empty"):
    await collect(running, request("b", []))
  with pytest.raises(errors.EngineError, match=r"97.*vocabulary of 97"):
    await collect(running, request("c", [97]))
  with pytest.raises(errors.EngineError, match="max_tokens=0"):
    await collect(running, request("d", [1], max_tokens=0))


async def test_a_failed_step_is_an_error_to_every_caller(running, monkeypatch):
  def explode(*_):
    raise RuntimeError("device on fire")

  monkeypatch.setattr(running._runner, "run", explode)
  with pytest.raises(errors.EngineError, match="device on fire"):
    await collect(running, request("a", [1, 2]))
  with pytest.raises(errors.EngineError, match="device on fire"):
    await collect(running, request("b", [1, 2]))


def test_sizes_that_do_not_fit_are_refused():
  with pytest.raises(errors.ConfigError, match=r"200 exceeds .* 128"):
    engine.JaxEngine(
      decoder(),
      config.EngineConfig(
        slots=8, context=200, decode_rows=(8,), prefill_rows=(4,)
      ),
    )
  for bad, name in (
    ({"decode_rows": (4,)}, "decode_rows"),
    ({"decode_rows": (8, 8)}, "decode_rows"),
    ({"prefill_rows": ()}, "prefill_rows"),
    ({"cache_tokens": 63}, "cache_tokens=63"),
    ({"page": 0}, "page=0"),
    ({"on_update": "drop"}, "on_update='drop'"),
  ):
    sizes = {"slots": 8, "context": 64, "decode_rows": (8,)}
    with pytest.raises(errors.ConfigError, match=name):
      engine.JaxEngine(
        decoder(), config.EngineConfig(**({"prefill_rows": (4,)} | sizes | bad))
      )


def made_with(*, decode_text=str, **changes):
  made = engine.JaxEngine(
    decoder(), dataclasses.replace(CONFIG, **changes), decode_text=decode_text
  )
  made.start()
  return made


async def test_a_row_is_the_same_to_the_last_bit_in_any_company():
  # The widths and step shapes of the demo: other products may go other ways.
  model = dataclasses.replace(
    MODEL,
    width=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_width=1536,
    vocab_size=512,
  )
  model = decoder_lib.Decoder(model, rngs=nnx.Rngs(params=0))
  model = mtp.grow(model, 1, rngs=nnx.Rngs(params=1))
  sizes = config.EngineConfig(
    slots=64,
    context=64,
    decode_rows=(64,),
    prefill_rows=(4, 16),
    prefill_patience=1,
    row_multiple=64,
    draft_tokens=0,
  )
  made = engine.JaxEngine(model, sizes)
  made.start()
  try:
    [prompt] = prompts(1)
    alone = await collect(made, request("alone", prompt, seed=5))
    made.flush_cache()
    others = [request(f"o{i}", p) for i, p in enumerate(prompts(30, seed=1))]
    crowd = await asyncio.gather(
      *(collect(made, r) for r in [*others, request("x", prompt, seed=5)])
    )
    again = await collect(made, request("cached", prompt, seed=5))
    assert crowd[-1] == alone == again
  finally:
    made.stop()
  made = engine.JaxEngine(
    model, dataclasses.replace(sizes, draft_tokens=2, draft_adaptive=False)
  )
  made.start()
  try:
    drafted = await asyncio.gather(
      *(collect(made, r) for r in [*others, request("x", prompt, seed=5)])
    )
    assert drafted == crowd and made.stats()["accepted_tokens"] > 0
  finally:
    made.stop()


@pytest.mark.parametrize("host_tokens", [0, 512])
async def test_few_pages_preempt_and_stay_exact(host_tokens):
  made = made_with(page=8, cache_tokens=96, host_cache_tokens=host_tokens)
  try:
    some = prompts(6, length=20)
    outs = await asyncio.gather(
      *(
        collect(made, request(str(i), p, seed=i, max_tokens=30))
        for i, p in enumerate(some)
      )
    )
    stats = made.stats()
    assert stats["preempted"] > 0 and stats["evicted_pages"] > 0
    assert (stats["loaded_pages"] > 0) == (host_tokens > 0)
    for prompt, (ids, logprobs, _, reason) in zip(some, outs, strict=True):
      assert len(ids) == 30 and reason == types.StopReason.LENGTH
      np.testing.assert_allclose(
        logprobs, dense_logprobs(decoder(), prompt, ids), atol=2e-5
      )
  finally:
    made.stop()


async def test_weights_swap_between_steps_without_dropping_requests():
  reached, swapped = threading.Event(), threading.Event()
  said = itertools.count(1)

  def decode_text(ids):  # on the engine's thread, at every token
    if next(said) == 20:
      reached.set()
      swapped.wait()
    return ""

  made = made_with(decode_text=decode_text)
  try:
    [prompt] = prompts(1)
    asked = request("long", prompt, max_tokens=40, stop_strings=("never",))
    running = asyncio.create_task(collect(made, asked))
    await asyncio.to_thread(reached.wait)
    new = decoder(seed=1)
    made.update_weights(types.WeightsVersion(1, params=nnx.state(new)))
    swapped.set()
    ids, _, versions, _ = await running
    first = versions.index(1)
    assert len(ids) == 40 and 20 <= first <= 24
    assert versions == [0] * first + [1] * (40 - first)
    fresh, logprobs, versions, _ = await collect(made, request("n", prompt))
    assert set(versions) == {1}
    np.testing.assert_allclose(
      logprobs, dense_logprobs(new, prompt, fresh), atol=2e-5
    )
  finally:
    made.stop()


@pytest.mark.parametrize("policy", ["keep", "recompute"])
async def test_running_requests_keep_or_recompute_their_cache(policy):
  made = made_with(on_update=policy, decode_steps=1)
  try:
    [prompt] = prompts(1)
    new = decoder(seed=1)
    ids, logprobs, versions = [], [], []
    async for chunk in made.generate(request("long", prompt, max_tokens=40)):
      ids += chunk.token_ids
      logprobs += chunk.logprobs
      versions += chunk.versions
      if len(ids) == len(chunk.token_ids):  # the first
        made.update_weights(types.WeightsVersion(1, params=nnx.state(new)))
    first = versions.index(1)
    fresh = dense_logprobs(new, prompt, ids)[first:]
    same = np.allclose(logprobs[first:], fresh, atol=2e-5)
    assert same == (policy == "recompute")
    assert len(ids) == 40 and versions == sorted(versions)
  finally:
    made.stop()


async def test_a_response_that_is_certain_for_long_is_cut_off():
  made = made_with(early_stop_tokens=5, early_stop_probability=0.5)
  try:
    [prompt] = prompts(1)
    # Only the likeliest token is left: each has probability one.
    ids, _, _, reason = await collect(made, request("a", prompt, top_k=1))
    assert len(ids) == 5 and reason == types.StopReason.LENGTH
    many = await collect(made, request("b", prompt, temperature=50.0))
    assert len(many[0]) == 10
  finally:
    made.stop()


async def test_a_full_queue_refuses_and_lives_on():
  made = made_with(most_waiting=2)
  try:
    made.pause()
    waiting = [
      asyncio.create_task(collect(made, request(str(i), p)))
      for i, p in enumerate(prompts(2))
    ]
    await asyncio.sleep(0.05)
    with pytest.raises(errors.EngineBusyError, match="2 requests are waiting"):
      await collect(made, request("more", [1, 2]))
    made.resume()
    assert [len(ids) for ids, *_ in await asyncio.gather(*waiting)] == [10, 10]
  finally:
    made.stop()


async def test_swaps_under_load_drop_nothing_and_compile_nothing(running):
  compiled = running.compilations
  states = [nnx.state(decoder(seed)) for seed in (1, 2)]
  tasks = [
    asyncio.create_task(
      collect(running, request(str(i), p, seed=i, max_tokens=40))
    )
    for i, p in enumerate(prompts(24, length=20))
  ]
  swaps = 0
  while not all(task.done() for task in tasks):
    swaps += 1
    await asyncio.to_thread(
      running.update_weights,
      types.WeightsVersion(swaps, params=states[swaps % 2]),
    )
    await asyncio.sleep(0)
  outs = await asyncio.gather(*tasks)
  assert swaps > 3 and running.compilations == compiled
  for ids, _, versions, reason in outs:
    assert len(ids) == 40 and reason == types.StopReason.LENGTH
    assert versions == sorted(versions)
