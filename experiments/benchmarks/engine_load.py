"""The loads of engine.py that are not about one batch: agents, and a soak.

`agents` plays groups of episodes of several turns, whose prompts share what a
group and an episode share. `soak` keeps clients with requests of every kind
busy while weights are swapped.
"""

import asyncio
import dataclasses
import os
import pathlib
import random
import time

from forge_jax import errors, types
from forge_jax.engine import api

CLIENTS = 16
# What requests may ask of the sampler, a client's requests in turn.
KINDS = (
  {},
  {"temperature": 0.0},
  {"top_p": 0.9, "top_k": 50},
  {"presence_penalty": 0.5, "logit_bias": ((17, 2.0),)},
  {"min_p": 0.05, "temperature": 0.7},
  {"top_logprobs": 5},
)


@dataclasses.dataclass(frozen=True)
class Episodes:
  """A group is of one task; every episode has so many turns."""

  groups: int = 8
  rollouts: int = 8  # episodes of a group
  turns: int = 6
  # In tokens: what all prompts begin with, then a task's text; what a turn
  # adds, sampled and heard.
  system: int = 64
  task: int = 96
  reply: int = 8
  observation: int = 24


def request(name, prompt, tokens, **sampling):
  params = api.SamplingParams(max_tokens=tokens, **sampling)
  return api.GenerateRequest(name, tuple(prompt), params)


async def sample(engine, asked):
  """The response's token ids."""
  found = []
  async for chunk in engine.generate(asked):
    found += chunk.token_ids
  return found


def agents(engine, episodes, vocab):
  """Plays the episodes.

  Returns:
    Seconds, and the share of the tokens of prompts that an earlier prompt had,
    of the same group or of the same episode, that came from the cache.
  """
  draw = random.Random(0)
  words = lambda count: [draw.randrange(vocab) for _ in range(count)]
  system, shareable = words(episodes.system), 0
  prompts = [system + words(episodes.task) for _ in range(episodes.groups)]
  places = [
    (group, member)
    for group in range(episodes.groups)
    for member in range(episodes.rollouts)
  ]
  heard = {
    place: [words(episodes.observation) for _ in range(episodes.turns)]
    for place in places
  }

  async def episode(group, member):
    nonlocal shareable
    history, known = list(prompts[group]), 0
    for turn in range(episodes.turns):
      if turn:  # all of the last turn but its last token
        shareable += known
      elif member:  # all of the group's prompt but its last token
        shareable += len(history) - 1
      elif group:
        shareable += episodes.system
      name = f"{group}.{member}.{turn}"
      asked = request(name, history, episodes.reply, seed=member)
      reply = await sample(engine, asked)
      known = len(history) + len(reply) - 1
      history += reply + heard[group, member][turn]

  async def play():
    await asyncio.gather(*(episode(*place) for place in places))

  engine.flush_cache()
  before = engine.stats()["reused_tokens"]
  started = time.perf_counter()
  asyncio.run(play())
  seconds = time.perf_counter() - started
  return seconds, (engine.stats()["reused_tokens"] - before) / shareable


def soak(engine, state, swaps, seconds, longest=200):
  """Swaps weights under load, evenly over the seconds.

  Args:
    engine: it serves nobody else.
    state: the weights, of every version.
    swaps: how many.
    seconds: how long, at least.
    longest: of the prompts, in tokens.

  Returns:
    Figures by name: requests, those that failed or came back short, seconds,
    and by how much the process grew after a tenth of the swaps, in GB.
  """
  counts = {"requests": 0, "dropped": 0, "aborted": 0}
  done = asyncio.Event()

  async def client(number):
    draw = random.Random(number)
    turn = 0
    while not done.is_set():
      tokens = draw.randrange(4, 48)
      prompt = range(draw.randrange(16, longest))
      asked = request(
        f"s{number}.{turn}", prompt, tokens, seed=turn, **KINDS[turn % 6]
      )
      turn += 1
      counts["requests"] += 1
      if draw.random() < 0.1:
        counts["aborted"] += 1
        async for _ in engine.generate(asked):
          break
        continue
      try:
        counts["dropped"] += len(await sample(engine, asked)) != tokens
      except errors.EngineError as error:
        print(f"dropped: {error}", flush=True)
        counts["dropped"] += 1

  async def play():
    clients = [asyncio.create_task(client(n)) for n in range(CLIENTS)]
    started = time.perf_counter()
    for swap in range(1, swaps + 1):
      weights = types.WeightsVersion(swap, params=state)
      await asyncio.to_thread(engine.update_weights, weights)
      await asyncio.to_thread(engine.settle, 60.0)
      if swap == -(-swaps // 10):
        before = _resident()
      left = started + swap / swaps * seconds - time.perf_counter()
      await asyncio.sleep(max(left, 0))
    after, took = _resident(), time.perf_counter() - started
    done.set()
    await asyncio.gather(*clients)
    return {"seconds": took, "grown_gb": after - before}

  return asyncio.run(play()) | counts


def _resident():
  """Memory of this process, GB."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
