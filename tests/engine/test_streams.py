"""Chunks reach a reader in order, and one that is behind as one."""

import asyncio
import threading

import pytest

from forge_jax import errors, types
from forge_jax.engine import api, streams

STOP = types.StopReason.STOP


def chunk(token, stop_reason=None):
  return api.TokenChunk(
    (token,), (-token / 2,), (token // 2,), stop_reason, (((token, -1.0),),)
  )


async def test_a_reader_that_keeps_up_gets_every_chunk():
  stream = streams.Stream()
  for token in range(3):
    stream.put(chunk(token))
    assert await stream.take() == chunk(token)


async def test_a_reader_that_is_behind_gets_one_chunk():
  stream = streams.Stream()
  for token in range(3):
    stream.put(chunk(token, STOP if token == 2 else None))
  assert await stream.take() == api.TokenChunk(
    (0, 1, 2),
    (0.0, -0.5, -1.0),
    (0, 0, 1),
    STOP,
    (((0, -1.0),), ((1, -1.0),), ((2, -1.0),)),
  )


async def test_an_error_comes_after_what_was_sampled_before_it():
  stream = streams.Stream()
  stream.put(chunk(1))
  stream.put(errors.EngineUnavailableError("gone"))
  assert await stream.take() == chunk(1)
  with pytest.raises(errors.EngineUnavailableError, match="gone"):
    await stream.take()


async def test_chunks_come_from_another_thread():
  one, other = streams.Stream(), streams.Stream()
  posts = [(one, chunk(1)), (other, chunk(2)), (one, chunk(3))]
  waiting = asyncio.create_task(one.take())
  await asyncio.sleep(0)
  thread = threading.Thread(target=streams.hand_over, args=[posts])
  thread.start()
  taken = [await waiting]
  while taken[-1].token_ids[-1] != 3:
    taken.append(await one.take())
  assert [id for part in taken for id in part.token_ids] == [1, 3]
  assert await other.take() == chunk(2)
  thread.join()
