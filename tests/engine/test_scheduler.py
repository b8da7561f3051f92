"""The scheduler, without a device: a counting model stands in for it."""

import numpy as np
import pytest

from forge_jax import types
from forge_jax.engine import api, scheduler


def request(name, prompt, max_tokens=4, stop=()):
  return api.GenerateRequest(
    name,
    tuple(prompt),
    api.SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
  )


def make(**changes):
  config = dict(
    slots=4, context=64, prefill_rows=2, prefill_chunk=4, prefill_patience=2
  )
  return scheduler.Scheduler(scheduler.SchedulerConfig(**config | changes))


def run(sched, requests, steps=200):
  """Runs to the end, sampling 1000 + position; checks each step."""
  for r in requests:
    sched.add(r)
  done, kinds = {}, []
  for _ in range(steps):
    step = sched.schedule()
    if step is None:
      break
    kinds.append("prefill" if step.width > 1 else "decode")
    slots = [live.slot for live in step.rows]
    assert len(set(slots)) == len(slots)
    sampled = []
    for live in step.rows:
      new = live.next_tokens(step.width)
      assert 1 <= len(new) <= step.width
      sampled.append(1000 + live.committed + len(new))
    for live, _ in sched.commit(step, sampled):
      if sched.stop_reason(live) is not None:
        done[live.request.id] = list(live.response)
        sched.finish(live.request.id)
  assert len(sched) == 0
  return done, kinds


def test_every_request_gets_its_tokens_in_order():
  requests = [
    request(str(i), range(100 * i + 1, 100 * i + 4 + 3 * i)) for i in range(7)
  ]
  done, _ = run(make(), requests)
  for r in requests:
    first = 1000 + len(r.prompt_ids)
    assert done[r.id] == list(range(first, first + 4))


def test_members_of_a_group_prefill_their_prompt_once():
  sched = make()
  prompt = range(1, 18)
  run(sched, [request(str(i), prompt, max_tokens=2) for i in range(4)])
  assert sched.prompt_tokens == 4 * 17
  # All but the last token of three of the four prompts is copied.
  assert sched.reused_tokens == 3 * 16


def test_a_prefill_step_waits_for_company_but_not_for_ever():
  sched = make(prefill_patience=2)
  sched.add(request("a", [1, 2], max_tokens=20))
  step = sched.schedule()
  sched.commit(step, [1000])
  sched.add(request("b", [7, 8], max_tokens=2))
  kinds = []
  for _ in range(3):
    step = sched.schedule()
    kinds.append(step.width)
    sched.commit(step, [5] * len(step.rows))
  assert kinds == [1, 1, 4]


def test_stop_token_and_context_end_a_request():
  sched = make(context=8)
  sched.add(request("stop", [1, 2], max_tokens=100, stop=(1003,)))
  sched.add(request("full", [3, 4], max_tokens=100))
  reasons = {}
  while (step := sched.schedule()) is not None:
    sampled = [
      1000 + live.committed + len(live.next_tokens(step.width))
      for live in step.rows
    ]
    for live, _ in sched.commit(step, sampled):
      reason = sched.stop_reason(live)
      if reason is not None:
        reasons[live.request.id] = (reason, live.length)
        sched.finish(live.request.id)
  assert reasons["stop"] == (types.StopReason.STOP, 4)
  assert reasons["full"] == (types.StopReason.LENGTH, 8)


def test_finish_frees_a_waiting_and_a_live_request():
  sched = make(slots=1)
  sched.add(request("a", [1, 2, 3]))
  sched.add(request("b", [4, 5, 6]))
  sched.schedule()
  assert sched.waiting == 1
  sched.finish("a")
  sched.finish("b")
  assert len(sched) == 0 and sched.schedule() is None


def test_forget_restarts_prefills_and_keeps_what_has_sampled():
  sched = make()
  sched.add(request("old", range(10)))
  for _ in range(3):
    sched.commit(sched.schedule(), [1])
  sched.add(request("new", range(50, 60)))
  step = sched.schedule()
  while "new" not in [live.request.id for live in step.rows]:
    sched.commit(step, [2] * len(step.rows))
    step = sched.schedule()
  sched.commit(step, [3] * len(step.rows))
  old, new = (sched._live[name] for name in ("old", "new"))
  kept = old.committed
  assert new.committed == 4 and not new.response
  sched.forget()
  assert new.committed == 0 and old.committed == kept and old.response
  assert not sched.ledger.shared(np.arange(10, dtype=np.int32)).any()


@pytest.mark.parametrize(
  "a, b, expected", [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 1), ([], [1], 0)]
)
def test_common_prefix(a, b, expected):
  as_ids = lambda x: np.asarray(x, np.int32)
  assert scheduler.common_prefix(as_ids(a), as_ids(b)) == expected
