"""Sandboxes opened ahead of time."""

import asyncio

import pytest

from forge_jax import errors
from forge_jax.agents.sandbox import base, ready, unsafe


class Counting:
  """Opens sandboxes of another backend, and counts; may fail."""

  def __init__(self):
    self.opened = []
    self.failing = False

  async def open(self, limits=None, *, gateway=None):
    if self.failing:
      raise errors.SandboxError("none today")
    box = await unsafe.UnsafeProcess().open(limits, gateway=gateway)
    self.opened.append(box)
    return box


async def settle(backend, count):
  async with asyncio.timeout(20):
    while len(backend.opened) < count:
      await asyncio.sleep(0.01)


async def test_the_next_was_opened_before_and_none_is_handed_out_twice():
  inner = Counting()
  async with ready.Ready(inner, count=2) as backend:
    first = await backend.open()
    await settle(inner, 3)
    assert inner.opened[0] is first
    second, third = await backend.open(), await backend.open()
    assert {second, third} == set(inner.opened[1:3])
    small = await backend.open(base.Limits(processes=9))
    assert small not in inner.opened[:3] and small is not third
    for box in (first, second, third, small):
      await box.put({"a": b"1"})
      assert await box.get() == {"a": b"1"}
      await box.aclose()
  await asyncio.sleep(0)
  for box in inner.opened:
    with pytest.raises(errors.SandboxError, match="it is closed"):
      await box.get()


async def test_what_cannot_be_opened_is_told_to_who_asks():
  inner = Counting()
  inner.failing = True
  async with ready.Ready(inner) as backend:
    with pytest.raises(errors.SandboxError, match="none today"):
      await backend.open()
    inner.failing = False
    async with await backend.open():
      pass
  with pytest.raises(errors.ConfigError, match="count is 0"):
    ready.Ready(inner, count=0)
