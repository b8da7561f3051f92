"""A gateway, a domain and agents with no model behind them."""

import asyncio

import numpy as np

from forge_jax import errors, types
from forge_jax.gateway import client


class FakeGateway:
  """Sessions in a dict; each captures one completion of four tokens."""

  def __init__(self):
    self.open = {}  # session -> (seed, sampling)
    self.opened = []  # every session there was, in order
    self.posted = ()  # rewards that every session received over HTTP
    self.failures = 0  # calls that fail before the next one works

  async def open_session(self, id, *, seed, sampling):
    await self._answer()
    assert id not in self.open
    self.open[id] = (seed, sampling)
    self.opened.append(id)
    return client.SessionKeys(f"key-{id}", "http://gateway/v1", f"control-{id}")

  def reward_url(self, id):
    return f"http://gateway/sessions/{id}/reward"

  async def close_session(self, id):
    await self._answer()
    if id not in self.open:
      raise errors.GatewayError(f"no session {id!r}")
    seed, _ = self.open.pop(id)
    tokens = np.arange(seed % 97, seed % 97 + 4, dtype=np.int32)
    completion = types.Completion(
      id=f"{id}/0",
      prompt_ids=np.array([1, 2], np.int32),
      response_ids=tokens,
      logprobs=np.full(4, -0.5, np.float32),
      versions=np.zeros(4, np.int32),
      stop_reason=types.StopReason.STOP,
    )
    return (completion,), tuple(self.posted)

  async def _answer(self):
    await asyncio.sleep(0)
    if self.failures:
      self.failures -= 1
      raise errors.GatewayError("connection refused")


class FakeEnvironment:
  """Pays `reward` for a reply; its verifier may raise."""

  tools = ()

  def __init__(self, reward=1.0):
    self.reward = reward
    self.replied = False

  def reset(self):
    return [{"role": "user", "content": "go"}]

  def respond(self, reply):
    self.replied = True

  def rewards(self):
    if isinstance(self.reward, Exception):
      raise self.reward
    value = self.reward if self.replied else 0.0
    return [types.Reward("answer", types.Component.PERF, value)]


class FakeMixture:
  """Endless tasks; `rewards` of the tasks, over and over."""

  def __init__(self, rewards=(1.0,)):
    self.rewards = rewards

  def task(self, index):
    return types.Task(f"fake/train/{index}", "fake", index, {})

  def environment(self, task):
    reward = self.rewards[task.index % len(self.rewards)]
    if reward is None:
      raise OSError("no environment today")
    return FakeEnvironment(reward)

  def max_tokens(self, task):
    return 16


class Echo:
  """Replies once. `before` runs first; what it raises is the failure."""

  def __init__(self, before=None):
    self.before = before
    self.endpoints = []
    self.running = self.most = 0

  async def run(self, environment, endpoint):
    self.endpoints.append(endpoint)
    self.running += 1
    self.most = max(self.most, self.running)
    try:
      await asyncio.sleep(0.001)
      if self.before is not None:
        await self.before()
      messages = [*environment.reset(), {"role": "assistant", "content": "ok"}]
      environment.respond(messages[-1])
      return messages
    finally:
      self.running -= 1
