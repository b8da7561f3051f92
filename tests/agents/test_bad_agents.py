"""Agents that misbehave, all in one group of a real host: the group completes.

What each does is data on its episode, is counted, and holds nothing up: the
trainer's queue gets the group, and the next one.
"""

import asyncio
import contextlib
import math
import os
import time

import pytest

from forge_jax import errors, types
from forge_jax.agents import black_box, profiles
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.agents.sandbox import bubblewrap
from forge_jax.gateway import client, scripted
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import store
from forge_jax.pool import window as window_lib
from forge_jax.rollout import host

LIMITS = sandbox_base.Limits(
  memory_bytes=256 * sandbox_base.MIB,
  processes=64,
  disk_bytes=32 * sandbox_base.MIB,
)
ASK = """python3 - <<'END'
import json, os, urllib.error, urllib.request
def post(url, body, key=os.environ["OPENAI_API_KEY"]):
  request = urllib.request.Request(url, json.dumps(body).encode(), {
    "Authorization": "Bearer " + key, "Content-Type": "application/json"})
  try:
    return urllib.request.urlopen(request).status
  except urllib.error.HTTPError as error:
    return error.code
base = os.environ["OPENAI_BASE_URL"]
assert post(base + "/chat/completions", {"model": "policy", "messages": [
  {"role": "user", "content": "hi"}]}) == 200
origin = base.removesuffix("/v1")
%s
END
"""
REWARD = {"name": "won", "component": "perf", "value": 1.0}


class World:
  """An environment whose verifier may misbehave, too."""

  tools = ()

  def __init__(self, verdict):
    self._verdict = verdict

  def reset(self):
    return [{"role": "user", "content": "Be good."}]

  def respond(self, reply):
    pass

  def rewards(self):
    return self._verdict()


def fair():
  return [types.Reward("fair", types.Component.PERF, 0.5)]


def crash():
  raise KeyError("no such case")


def unsure():
  return [types.Reward("sure", types.Component.PERF, math.nan)]


# By name: what the program does, its verifier, and what its episode says.
BAD = {
  "it never asks": ("exit 0", fair, "no completion: the agent never asked"),
  "it writes 10 GB": (
    ASK % "" + "head -c 10G /dev/zero >big",
    fair,
    "AgentError: bad: exit status",
  ),
  "it forks for ever": (
    ASK % "" + "f() { f | f & f; }; f",
    fair,
    "AgentError: bad: ",
  ),
  "it hangs": (ASK % "" + "sleep 600", fair, "AgentError: bad: timed out"),
  "its verifier crashes": (ASK % "", crash, "rewards: KeyError: 'no such"),
  "its verifier hangs": (
    ASK % "",
    lambda: time.sleep(30),
    "rewards: TimeoutError: none after 2 seconds",
  ),
  "its reward is no number": (ASK % "", unsure, "reward 'sure' is nan"),
  # These are refused, which the program sees, and are no failure.
  "it closes its session twice": (
    ASK
    % """
for _ in range(2):
  assert post(f"{origin}/sessions/{os.environ['OWN']}/close", {}) == 401
""",
    fair,
    None,
  ),
  "it rewards another session": (
    ASK
    % f"""
for session in ("other", os.environ["OWN"]):
  url = f"{{origin}}/sessions/{{session}}/reward"
  assert post(url, {{"rewards": [{REWARD}]}}) == 401
""",
    fair,
    None,
  ),
}


class Tasks:
  """The same task for ever; the environments follow the members."""

  def __init__(self):
    self.made = 0

  def task(self, index):
    return types.Task(f"bad/train/{index}", "bad", index, {})

  def environment(self, task):
    verdict = list(BAD.values())[self.made % len(BAD)][1]
    self.made += 1
    return World(verdict)

  def max_tokens(self, task):
    return 16


class Misbehaving:
  """Plays each episode with the next program."""

  def __init__(self, backend):
    self._backend = backend
    self._next = 0

  async def run(self, environment, endpoint):
    script = list(BAD.values())[self._next % len(BAD)][0]
    self._next += 1
    profile = profiles.Profile(
      "bad",
      ("sh", "-c", script),
      env={"OWN": endpoint.reward_url.split("/")[-2]},
    )
    config = black_box.BlackBoxConfig(seconds=6.0, limits=LIMITS)
    agent = black_box.BlackBoxAgent(profile, self._backend, config)
    return await agent.run(environment, endpoint)


@pytest.fixture
def backend():
  try:
    return bubblewrap.Bubblewrap()
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))


async def test_a_group_of_bad_agents_holds_no_window(backend, tmp_path):
  config = host.RolloutConfig(
    group_size=len(BAD),
    permits=len(BAD),
    deadline_seconds=30.0,
    verifier_seconds=2.0,
  )
  window = window_lib.WindowConfig(max_lag=0, groups_per_step=1)
  with (
    scripted.serve(lambda request: "hello") as gateway,
    store.DataPool.open(tmp_path / "pool") as pool,
  ):
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    await admin.open_session("other", seed=0)
    queue = queue_lib.GroupQueue(pool, window)
    rollout = host.RolloutHost(
      config, Tasks(), Misbehaving(backend), admin, queue, "policy"
    )
    running = asyncio.create_task(rollout.run())
    (group,) = await asyncio.to_thread(queue.take, 1, 90)
    stats = rollout.stats()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await running
    _, stolen = await admin.close_session("other")
    await admin.aclose()
  assert len(group.episodes) == len(BAD)
  for episode, (name, (_, verdict, error)) in zip(
    group.episodes, BAD.items(), strict=True
  ):
    if error is None:
      assert episode.error is None, (name, episode.error)
    else:
      assert episode.status == types.EpisodeStatus.FAILED, name
      assert episode.error.startswith(error), (name, episode.error)
    assert len(episode.completions) == (name != "it never asks"), name
    assert [r.value for r in episode.rewards] == [0.5] * (verdict is fair)
  assert stats["failures"] == sum(bad[2] is not None for bad in BAD.values())
  assert stolen == ()


async def test_whoever_may_close_a_session_may_do_it_twice(backend):
  with scripted.serve(lambda request: "hello") as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    await admin.open_session("s", seed=0)
    once = await admin.close_session("s")
    assert await admin.close_session("s") == once
    await admin.aclose()
