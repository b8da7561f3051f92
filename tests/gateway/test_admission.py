"""Admission: bounded, and fair between sessions."""

import asyncio

import pytest

from forge_jax.gateway import admission, refusal


async def settle():
  for _ in range(5):
    await asyncio.sleep(0)


class Crowd:
  """Requests that hold their permits until told to leave."""

  def __init__(self, gate):
    self.gate = gate
    self.inside = []
    self.leave = {}

  def come(self, session, name, size=0):
    self.leave[name] = asyncio.Event()
    return asyncio.create_task(self._visit(session, name, size))

  async def _visit(self, session, name, size):
    async with self.gate.permit(session, size):
      self.inside.append(name)
      await self.leave[name].wait()
    self.inside.remove(name)


async def test_sessions_take_turns_and_each_keeps_its_order():
  crowd = Crowd(admission.Admission(1, 100))
  names = [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1")]
  tasks = []
  for session, name in names:
    tasks.append(crowd.come(session, name))
    await settle()
  order = []
  for _ in names:
    (name,) = crowd.inside
    order.append(name)
    crowd.leave[name].set()
    await settle()
  assert order == ["a1", "a2", "b1", "c1", "a3"]
  await asyncio.gather(*tasks)
  assert crowd.gate.running == crowd.gate.waiting == 0


async def test_too_many_are_turned_away_with_a_time():
  gate = admission.Admission(2, 1)
  crowd = Crowd(gate)
  tasks = [crowd.come("a", n) for n in range(3)]
  await settle()
  assert (gate.running, gate.waiting) == (2, 1)
  with pytest.raises(refusal.Refusal) as caught:
    async with gate.permit("b"):
      pass
  assert caught.value.status == 429 and caught.value.retry_after >= 1
  for event in crowd.leave.values():
    event.set()
  await asyncio.gather(*tasks)


async def test_no_session_fills_the_queue_for_all():
  gate = admission.Admission(1, 3)
  crowd = Crowd(gate)
  tasks = {}
  for name in ("a0", "a1", "a2", "a3"):
    tasks[name] = crowd.come("a", name)
    await settle()
  tasks["b0"] = crowd.come("b", "b0")
  await settle()
  with pytest.raises(refusal.Refusal) as caught:
    await tasks.pop("a3")
  assert caught.value.status == 429
  for session in "ab":  # now the one has two waiting and the other one
    with pytest.raises(refusal.Refusal):
      gate.check(session)
    with pytest.raises(refusal.Refusal):
      await crowd.come(session, "more")
  gate.check("c")
  for event in crowd.leave.values():
    event.set()
  await asyncio.gather(*tasks.values())
  assert gate.running == gate.waiting == 0


async def test_what_waits_is_bounded_by_its_bytes():
  gate = admission.Admission(1, 100, most_bytes=10)
  crowd = Crowd(gate)
  tasks = {"a0": crowd.come("a", "a0", 50)}  # runs: it does not wait
  await settle()
  for name, size in (("a1", 4), ("a2", 3), ("a3", 3)):
    tasks[name] = crowd.come("a", name, size)
    await settle()
  assert (gate.waiting, gate.waiting_bytes) == (3, 10)
  with pytest.raises(refusal.Refusal):
    gate.check("a", 1)
  with pytest.raises(refusal.Refusal):  # it would have more than the other has
    await crowd.come("b", "b0", 11)
  gate.check("b", 5)
  tasks["b1"] = crowd.come("b", "b1", 5)  # takes the room of two
  for name in ("a3", "a2"):
    with pytest.raises(refusal.Refusal) as caught:
      await tasks.pop(name)
    assert caught.value.status == 429
  assert (gate.waiting, gate.waiting_bytes) == (2, 9)
  for event in crowd.leave.values():
    event.set()
  await asyncio.gather(*tasks.values())
  assert gate.running == gate.waiting == gate.waiting_bytes == 0


async def test_one_that_is_refused_and_goes_away_takes_no_permit_with_it():
  gate = admission.Admission(1, 2)
  crowd = Crowd(gate)
  tasks = [crowd.come("a", n) for n in range(3)]
  await settle()
  tasks.append(crowd.come("b", 3))
  await asyncio.sleep(0)  # the newest of the other session is refused
  tasks[2].cancel()
  await settle()
  assert tasks[2].cancelled() and (gate.running, gate.waiting) == (1, 2)
  for event in crowd.leave.values():
    event.set()
  await asyncio.gather(*tasks[:2], tasks[3])
  assert gate.running == gate.waiting == 0


@pytest.mark.parametrize("late", [False, True])
async def test_whoever_goes_away_leaves_no_permit_behind(late):
  gate = admission.Admission(1, 10)
  crowd = Crowd(gate)
  first = crowd.come("a", "first")
  await settle()
  gone = crowd.come("a", "gone")
  last = crowd.come("b", "last")
  await settle()
  if late:  # the permit is on its way when the client goes
    crowd.leave["first"].set()
    while gate.waiting == 2:
      await asyncio.sleep(0)
  gone.cancel()
  crowd.leave["first"].set()
  await settle()
  assert crowd.inside == ["last"]
  crowd.leave["last"].set()
  await asyncio.gather(first, last)
  assert gate.running == gate.waiting == 0
