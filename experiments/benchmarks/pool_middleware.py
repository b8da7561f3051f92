"""Samples a second through everything between an engine and a device.

A gateway session records each request (prompt ids, response ids, behaviour
log-probabilities, versions) and places it in the session's forest; the group
becomes durable; the windowed FIFO hands it to the trainer, whose claim is
durable; credit and packing turn it into device batches. Sampling, HTTP and the
update itself are left out. One process, one interpreter lock: a system of
several processes has more.
"""

import asyncio
import pathlib
import threading
import time

import numpy as np

from forge_jax import types
from forge_jax.gateway import render, scripted, sessions
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import store, window
from forge_jax.trainer import credit
from forge_jax.tree import pack

MEMBERS, TURNS, PROMPT, RESPONSE = 8, 4, 500, 200  # of a group; tokens
BATCH = 8  # groups of a step
SAMPLES = MEMBERS * TURNS  # of a group: one per completion
_RENDERER = render.Renderer(scripted.byte_tokenizer())
VOCAB = _RENDERER.vocabulary_size


def run(path: pathlib.Path, groups: int) -> dict[str, float]:
  """Completions a second, and tokens of their requests, end to end."""
  steps = max(1, groups // BATCH)
  config = window.WindowConfig(
    in_flight=64, max_lag=8, groups_per_step=BATCH, total=steps * BATCH
  )
  tokens = 0
  with store.DataPool.open(path / "middleware") as pool:
    queue = queue_lib.GroupQueue(pool, config)
    host = threading.Thread(
      target=asyncio.run, args=(_roll_out(queue, steps * BATCH),)
    )
    started = time.perf_counter()
    host.start()
    for step in range(1, steps + 1):
      batch = queue.take(BATCH, timeout=120)
      samples, _ = credit.assign_credit(batch, credit.CreditConfig())
      packs = pack.PackConfig(tokens=16_384, edges=16_384, rows=16_384)
      _, stats = pack.pack(samples, packs, vocab_size=VOCAB)
      tokens += stats.request_tokens
      queue.commit(step)
    seconds = time.perf_counter() - started
    host.join()
  return {
    "middleware_samples_s": steps * BATCH * SAMPLES / seconds,
    "middleware_tokens_s": tokens / seconds,
  }


async def _roll_out(queue: queue_lib.GroupQueue, left: int) -> None:
  """Rolls out `left` groups, four at a time."""

  async def work() -> None:
    nonlocal left
    while left > 0:
      left -= 1
      ticket = await queue.admit()
      await asyncio.to_thread(queue.complete, _group(ticket.index))

  try:
    async with asyncio.TaskGroup() as workers:
      for _ in range(4):
        workers.create_task(work())
  except BaseException as error:
    queue.fail(error)  # else the trainer waits
    raise


def _group(index: int) -> types.Group:
  rng = np.random.default_rng(index)
  task = types.Task(f"bench/train/{index}", "bench", index, {})
  start = rng.integers(0, VOCAB, PROMPT).tolist()
  episodes = tuple(_episode(index, m, task, start, rng) for m in range(MEMBERS))
  return types.Group(index, task, episodes)


def _episode(
  index: int,
  member: int,
  task: types.Task,
  start: list[int],
  rng: np.random.Generator,
) -> types.Episode:
  """Requests as the gateway records them, each extending the last."""
  name = f"group{index}-{member}"
  session = sessions.Session(name, seed=member, sampling={})
  history = list(start)
  for _ in range(TURNS):
    plan = session.begin_raw(_RENDERER, history)
    response = rng.integers(0, VOCAB, RESPONSE).tolist()
    session.record(
      plan,
      response_ids=response,
      logprobs=(-rng.random(RESPONSE)).tolist(),
      versions=[index // BATCH] * RESPONSE,
      stop_reason=types.StopReason.STOP,
      reply="",
    )
    new = rng.integers(0, VOCAB, 50).tolist()
    history = [*plan.prompt_ids.tolist(), *response, *new]
  return types.Episode(
    id=name,
    task=task,
    member=member,
    seed=member,
    status=types.EpisodeStatus.COMPLETED,
    completions=session.completions(),
    rewards=(types.Reward("score", types.Component.PERF, float(member % 2)),),
  )
