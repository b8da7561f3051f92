"""What a session keeps of its requests, and that closing it frees all."""

import asyncio
import gc
import tracemalloc
import weakref

from forge_jax import types
from forge_jax.gateway import addition, session_table, sessions


class OneToken:
  """Writes any number of messages as one token."""

  def render(self, messages, tools):
    return addition.Addition.of([len(messages)])

  def extend(self, prompt_ids, response_ids, conversation, new, *others):
    return addition.Addition.of([len(conversation)])


def play(session, turns, size):
  """A conversation whose user says so many characters a turn, all new."""
  messages = []
  for n in range(turns):
    text = f"{n} ".ljust(size, "x")
    messages.append({"role": "user", "content": text})
    plan = session.begin(OneToken(), messages, ())
    reply = {"role": "assistant", "content": f"I see {n}."}
    session.record(
      plan,
      response_ids=[7] * 10,
      logprobs=[-0.5] * 10,
      versions=[0] * 10,
      stop_reason=types.StopReason.STOP,
      reply=reply,
    )
    messages.append(reply)
  assert all(c.parent for c in session.completions()[1:])


def test_what_an_agent_says_is_not_kept():
  play(sessions.Session("warm", 0, {}), 5, 10)
  kept = []
  tracemalloc.start()
  try:
    for size in (100, 20_000):
      gc.collect()
      before, _ = tracemalloc.get_traced_memory()
      kept.append(sessions.Session(f"s{size}", 0, {}))
      play(kept[-1], 50, size)
      gc.collect()
      grown = tracemalloc.get_traced_memory()[0] - before
      assert grown < 50 * 2500, f"{grown / 50:.0f} bytes a turn"
  finally:
    tracemalloc.stop()


async def test_a_session_that_is_over_leaves_nothing(
  start, smollm2, monkeypatch
):
  monkeypatch.setattr(session_table, "_HOLD_SECONDS", 0.01)
  h = await start(smollm2)
  keys = await h.open()
  h.say("one", "two")
  messages = [{"role": "user", "content": "?"}]
  await h.chat(keys, messages)
  await h.chat(keys, messages, stream=False, temperature=0.5)
  session = weakref.ref(h.gateway._table.by_id("s"))
  await h.admin.close_session("s")
  for _ in range(200):
    gc.collect()
    if session() is None:
      return
    await asyncio.sleep(0.05)
  raise AssertionError(f"held by {gc.get_referrers(session())}")
