"""Requests over several engines: affinity, load, failures, controls."""

import asyncio
import contextlib

import pytest

from forge_jax import errors, types
from forge_jax.engine import api, scripted
from forge_jax.gateway import router

CONFIG = router.RouterConfig(block=4, slack=2, rest=60.0)


def engines(count, delay=0.0):
  reply = lambda request: [7] * 20
  return [scripted.ScriptedEngine(reply, delay=delay) for _ in range(count)]


def request(id, prompt):
  sampling = api.SamplingParams(max_tokens=5)
  return api.GenerateRequest(id, tuple(prompt), sampling)


async def run(made, id, prompt):
  return [chunk async for chunk in made.generate(request(id, prompt))]


def served(some):
  return [engine.stats()["requests"] for engine in some]


@contextlib.asynccontextmanager
async def held(made, *asked):
  """Requests in flight for the length of a block."""
  streams = [made.generate(one) for one in asked]
  for stream in streams:
    await anext(stream)
  try:
    yield
  finally:
    for stream in streams:
      await stream.aclose()


async def test_a_session_stays_where_its_prefix_is():
  some = engines(3, delay=0.001)
  made = router.Router(some, CONFIG)
  first, second = list(range(9)), list(range(100, 109))
  async with held(made, request("busy", [50] * 5)):
    await run(made, "a0", first)  # the first is busy: this goes elsewhere
  home = served(some)
  assert home == [1, 1, 0]
  for turn in range(1, 4):
    await run(made, f"a{turn}", first + [turn] * 6 * turn)
  assert served(some) == [1, 4, 0]
  await run(made, "b", second)
  assert served(some) == [2, 4, 0]
  assert made.stats()["routed_by_prefix"] == 3


async def test_a_longer_shared_prefix_wins():
  some = engines(2, delay=0.001)
  made = router.Router(some, CONFIG)
  system, ours = [1] * 8, [1] * 8 + [2] * 8
  await run(made, "a", system)
  async with held(
    made, *(request(f"h{n}", system + [9] * 4) for n in range(3))
  ):
    await run(made, "b", ours)  # beyond the slack
  assert served(some) == [4, 1]
  await run(made, "c", [*ours, 3, 3, 3, 3])
  assert served(some) == [4, 2]


async def test_prompts_without_a_prefix_spread_by_load():
  some = engines(3, delay=0.001)
  made = router.Router(some, CONFIG)
  async with held(made, *(request(str(n), [n] * 8) for n in range(9))):
    assert served(some) == [3, 3, 3]


async def test_what_is_remembered_is_bounded():
  some = engines(2)
  config = router.RouterConfig(block=4, remembered=10)
  made = router.Router(some, config)
  for n in range(50):
    await run(made, str(n), [n] * 12)
  assert len(made._served) == 10


class Away(scripted.ScriptedEngine):
  """An engine that breaks off after some tokens."""

  def __init__(self, tokens):
    super().__init__(lambda request: [7] * 20)
    self.calls = 0
    self._tokens = tokens

  async def generate(self, asked):
    self.calls += 1
    for _ in range(self._tokens):
      yield api.TokenChunk((7,), (-1.0,), (0,))
    raise errors.EngineUnavailableError("gone")


async def test_an_engine_that_is_away_is_left_out_and_its_request_moves():
  away, [here] = Away(0), engines(1)
  made = router.Router([away, here], CONFIG)
  for n in range(3):
    found = await run(made, str(n), [1] * 8)
    assert found[-1].stop_reason == types.StopReason.LENGTH
  assert away.calls == 1 and served([here]) == [3]
  assert made.stats()["rerouted"] == 1


async def test_a_request_with_tokens_does_not_move():
  away, [here] = Away(1), engines(1)
  made = router.Router([away, here], CONFIG)
  found = []
  with pytest.raises(errors.EngineUnavailableError, match="gone"):
    async for chunk in made.generate(request("a", [1] * 8)):
      found.append(chunk)
  assert len(found) == 1 and served([here]) == [0]


async def test_when_all_are_away_the_error_is_theirs_and_they_are_tried_again():
  some = [Away(0), Away(0)]
  made = router.Router(some, CONFIG)
  for _ in range(2):
    with pytest.raises(errors.EngineUnavailableError, match="gone"):
      await run(made, "a", [1] * 8)
  assert [one.calls for one in some] == [2, 2]


async def test_a_refusal_is_not_tried_elsewhere():
  some = engines(2)
  made = router.Router(some, CONFIG)
  with pytest.raises(errors.ContextOverflowError):
    await run(made, "a", [1] * 5000)
  assert served(some) == [1, 0]
  assert made.max_context == 4096


async def test_aborts_and_controls_reach_the_engines():
  some = engines(2, delay=0.005)
  made = router.Router(some, CONFIG)
  task = asyncio.create_task(run(made, "a", [1] * 8))
  while not some[0].stats()["running"]:
    await asyncio.sleep(0.001)
  made.abort("unknown")
  made.abort("a")
  assert (await task)[-1].stop_reason == types.StopReason.ABORT
  await asyncio.to_thread(
    made.update_weights, types.WeightsVersion(4, path="v4")
  )
  await asyncio.to_thread(made.flush_cache)
  assert made.stats()["version"] == 4 and made.stats()["flushes"] == 2
  made.pause()
  made.resume()
  assert len(await run(made, "b", [1] * 8)) == 5


def version(number):
  return types.WeightsVersion(number, path=f"v{number}")


async def versions(made, count):
  """The versions that so many requests with nothing in common meet."""
  asked = (run(made, f"r{n}", [n] * 8) for n in range(count))
  replies = await asyncio.gather(*asked)
  return {v for chunks in replies for chunk in chunks for v in chunk.versions}


async def test_weights_that_one_engine_does_not_take_are_never_mixed(caplog):
  some = engines(3, delay=0.002)
  made = router.Router(some, CONFIG)
  made.update_weights(version(1))
  take = some[1].update_weights

  def refuse(weights):
    raise errors.EngineError(f"version {weights.version} is refused")

  some[1].update_weights = refuse
  before = served(some)[1]
  made.update_weights(version(2))
  assert "engine 1 of 3 has not taken weights version 2" in caplog.text
  assert made.stats()["stale_engines"] == 1 and made.stats()["version"] == 2
  assert await versions(made, 9) == {2}
  assert served(some)[1] == before
  some[1].update_weights = take
  made.update_weights(version(3))
  assert made.stats()["stale_engines"] == 0
  assert await versions(made, 9) == {3} and served(some)[1] > before


async def test_weights_that_no_engine_takes_leave_the_old_ones():
  some = engines(2)
  made = router.Router(some, CONFIG)
  made.update_weights(version(1))

  def refuse(weights):
    raise errors.EngineError(f"version {weights.version} is refused")

  for engine in some:
    engine.update_weights = refuse
  with pytest.raises(errors.EngineError, match="version 2 is refused"):
    made.update_weights(version(2))
  assert made.stats()["version"] == 1
  assert await versions(made, 4) == {1}


async def test_engines_that_are_left_out_do_not_stand_in_for_one_that_is_away():
  [stale], away = engines(1), Away(0)
  made = router.Router([away, stale], CONFIG)
  away.update_weights = lambda weights: None

  def refuse(weights):
    raise errors.EngineUnavailableError("restarting")

  stale.update_weights = refuse
  made.update_weights(version(1))
  with pytest.raises(errors.EngineUnavailableError, match="gone"):
    await run(made, "a", [1] * 8)
  assert served([stale]) == [0]
