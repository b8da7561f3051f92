"""The gateway benchmark's load generator, without its timings."""

import asyncio
import json

import pytest

from experiments.benchmarks import gateway_load as load
from forge_jax.gateway import scripted

WORKLOAD = load.Workload("small", first=600, grows=300, turns=3)


def test_messages_have_the_sizes_that_are_told():
  for workload in (load.SMALL, load.LARGE):
    agent = load.Agent("http://127.0.0.1:1", "", workload, load.Tally())
    sizes = []
    for turn in range(workload.turns):
      agent.say(f"{turn}")
      sizes.append(len(b",".join(agent.messages)))
      json.loads(b"[%b]" % b",".join(agent.messages))
    mean = sum(sizes) / len(sizes)
    assert mean == pytest.approx(workload.mean, rel=0.02)
    assert float(workload.name.split()[0]) * 1000 == pytest.approx(
      mean, rel=0.02
    )


def test_agents_play_whole_sessions():
  tally = load.Tally()
  with scripted.serve(lambda _: load.REPLY) as gateway:
    asyncio.run(
      load.play_sessions(
        gateway.url, gateway.admin_token, WORKLOAD, 4, 0.5, tally
      )
    )
  assert tally.served == len(gateway.requests) == len(tally.seconds) > 8
  assert tally.held > 0
  assert tally.errors == tally.lost == tally.unlinked == 0


def test_sessions_are_held_at_a_steady_rate():
  tally = load.Tally()

  async def hold(gateway):
    async with load.opened(
      gateway.url, gateway.admin_token, WORKLOAD, 5, tally
    ) as sessions:
      await load.paced(sessions, 100, 0.2)

  with scripted.serve(lambda _: load.REPLY) as gateway:
    asyncio.run(hold(gateway))
  assert tally.served == 20 and tally.held == 5
  assert tally.errors == tally.lost == tally.unlinked == 0


def test_what_is_wrong_is_counted():
  tally = load.Tally()

  async def hold(gateway):
    async with load.opened(
      gateway.url, gateway.admin_token, WORKLOAD, 1, tally
    ) as sessions:
      await sessions[0].ask()  # fails
      await sessions[0].ask()  # another reply
      await sessions[0].ask()
      sessions[0].served += 2  # of which the gateway knows nothing

  replies = iter([None, "something else", load.REPLY])

  def reply(_):
    said = next(replies)
    if said is None:
      raise ValueError("the first fails")
    return said

  with scripted.serve(reply) as gateway:
    asyncio.run(hold(gateway))
  assert (tally.served, tally.errors) == (1, 2)
  assert (tally.lost, tally.held) == (1, 0)
  assert any("500" in problem for problem in tally.problems)
