"""The scheduler, without a device: a counting model stands in for it."""

import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax import types
from forge_jax.engine import api, prefix_cache, scheduler

PAGE = 4


def request(name, prompt, max_tokens=4, stop=(), session="", priority=0):
  return api.GenerateRequest(
    name,
    tuple(prompt),
    api.SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
    session,
    priority,
  )


def make(pages=200, host_pages=0, drafts=0, **changes):
  config = dict(
    slots=4,
    context=64,
    blocks=2,
    block=4,
    prefill_patience=2,
    decode_steps=3,
  )
  return scheduler.Scheduler(
    scheduler.SchedulerConfig(**config | changes),
    prefix_cache.PrefixCache(pages, PAGE, host_pages),
    lambda rows, steps: drafts,
  )


def step_once(sched, done, steps=None):
  """Runs a step; samples 1000 + position; checks what was scheduled."""
  step = sched.schedule()
  if step is None:
    return None
  config = sched.config
  assert len(step.decode) <= config.slots and len(step.blocks) <= config.blocks
  assert step.decode or step.blocks
  assert step.decode_steps == 1 or not (step.blocks or sched.waiting)
  expected = {}
  for live in step.decode:
    assert live.committed == live.length - 1
  for live, drafts in zip(step.decode, step.drafts, strict=True):
    tokens = step.decode_steps * (1 + drafts)
    assert len(live.lease.pages) * PAGE >= live.committed + tokens
    assert tokens <= live.left(config.context) and not (drafts and step.blocks)
  for block in step.blocks:
    at = expected.setdefault(block.live.request.id, block.live.committed)
    assert block.start == at and 1 <= len(block.tokens) <= config.block
    assert len(block.live.lease.pages) * PAGE >= at + len(block.tokens)
    expected[block.live.request.id] += len(block.tokens)
  if steps is not None:
    steps.append(step)
  index = 0
  for _ in range(step.decode_steps):
    right = [
      1 + live.length % (1 + n)
      for live, n in zip(step.decode, step.drafts, strict=True)
    ]
    for n in range(max(right, default=1)):
      tokens = [
        1000 + live.length if n < most else -1
        for live, most in zip(step.decode, right, strict=True)
      ]
      tokens += [
        1000 + block.start + len(block.tokens) for block in step.blocks
      ]
      sampled = sched.commit(step, tokens, index)
      index += 1
      for live, _ in sampled:
        if sched.stop_reason(live) is not None:
          done[live.request.id] = list(live.response)
          sched.finish(live.request.id)
  return step


def run(sched, requests, limit=2000):
  """Runs to the end; returns responses and steps."""
  for r in requests:
    sched.add(r)
  done, steps = {}, []
  for _ in range(limit):
    if step_once(sched, done, steps) is None:
      break
  assert len(sched) == 0
  return done, steps


def responses(requests):
  """What the counting model replies."""
  return {
    r.id: [
      1000 + len(r.prompt_ids) + n
      for n in range(min(r.sampling.max_tokens, 64 - len(r.prompt_ids)))
    ]
    for r in requests
  }


def test_every_request_gets_its_tokens_in_order():
  requests = [
    request(str(i), range(100 * i + 1, 100 * i + 4 + 3 * i)) for i in range(7)
  ]
  done, _ = run(make(), requests)
  assert done == responses(requests)


REQUESTS = st.lists(
  st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=40),  # prompt
    st.integers(1, 40),  # max_tokens
    st.integers(0, 2),  # priority
    st.sampled_from(["", "a", "b"]),
    st.integers(0, 6),  # steps before the next arrives
  ),
  min_size=1,
  max_size=9,
)


@hypothesis.given(
  REQUESTS, st.integers(17, 40), st.sampled_from([0, 8]), st.integers(0, 3)
)
@hypothesis.settings(max_examples=100)
def test_preemption_loses_no_request_and_no_token(
  some, pages, host_pages, drafts
):
  sched = make(pages, host_pages, drafts)
  requests = [
    request(str(i), prompt, most, (), session, priority)
    for i, (prompt, most, priority, session, _) in enumerate(some)
  ]
  done = {}
  for r, (*_, steps) in zip(requests, some, strict=True):
    sched.add(r)
    for _ in range(steps):
      step_once(sched, done)
  for _ in range(3000):
    if step_once(sched, done) is None:
      break
  assert done == responses(requests) and len(sched) == 0


def test_members_of_a_group_prefill_their_prompt_once():
  sched = make()
  prompt = range(1, 18)
  run(sched, [request(str(i), prompt, max_tokens=2) for i in range(4)])
  assert sched.prompt_tokens == 4 * 17
  assert sched.reused_tokens == 3 * 16  # all but the last of three prompts


def test_turns_of_an_episode_prefill_what_is_new():
  sched = make()
  done, _ = run(sched, [request("1", range(10), max_tokens=7)])
  history = [*range(10), *done["1"], 5, 6, 7]
  before = sched.reused_tokens
  run(sched, [request("2", history, max_tokens=2)])
  assert sched.reused_tokens - before == 16  # all but the last sampled token


def test_drafts_go_as_far_as_tokens_pages_and_the_budget_allow():
  sched = make(drafts=3, decode_steps=1)
  sched.add(request("a", [1, 2], max_tokens=7))
  sched.add(request("b", [3, 4], max_tokens=20))
  kinds = []
  while len(sched):
    kinds.append(step_once(sched, {}).drafts)
  assert kinds[0] == () and kinds[1] == (3, 3)
  assert {drafts for some in kinds for drafts in some} == {0, 1, 2, 3}
  few = make(pages=17, drafts=3, slots=2)
  few.add(request("a", range(30), max_tokens=30))
  few.add(request("b", range(50, 58), max_tokens=40))
  steps = []
  while not few.preempted:
    steps.append(step_once(few, {}))
  both = [step.drafts for step in steps if len(step.decode) == 2]
  assert both[-1] == (0, 0)  # rather than preempt anybody
  tight = make(drafts=3, step_tokens=6)
  for name in "ab":
    tight.add(request(name, [ord(name)], max_tokens=20))
  while len((step := step_once(tight, {})).decode) < 2:
    pass
  assert step.drafts == (2, 2)


def test_prompt_blocks_ride_with_decoding():
  sched = make()
  sched.add(request("a", [1, 2], max_tokens=20))
  step_once(sched, {})
  sched.add(request("b", range(50, 60)))
  step = step_once(sched, {})
  assert [live.request.id for live in step.decode] == ["a"]
  assert [block.start for block in step.blocks] == [0, 4]


def test_a_part_filled_prefill_waits_for_company_but_not_for_ever():
  sched = make(prefill_patience=2)
  sched.add(request("a", [1, 2], max_tokens=20))
  step_once(sched, {})
  sched.add(request("b", [7, 8], max_tokens=2))
  kinds = [len(step_once(sched, {}).blocks) for _ in range(3)]
  assert kinds == [0, 0, 1]


def test_the_token_budget_bounds_a_step():
  sched = make(blocks=8, step_tokens=9)
  sched.add(request("a", [1], max_tokens=30))
  step_once(sched, {})
  sched.add(request("b", range(40)))
  sizes = []
  while not sched.schedule().decode[1:]:
    step = step_once(sched, {})
    sizes.append(len(step.decode) + sum(len(b.tokens) for b in step.blocks))
  assert max(sizes) == 9 and sum(sizes) >= 40


def test_several_tokens_at_once_only_while_nobody_waits():
  sched = make(slots=1)
  sched.add(request("a", [1], max_tokens=8))
  done, steps = {}, []
  step_once(sched, done, steps)
  step_once(sched, done, steps)
  sched.add(request("b", [2], max_tokens=1))
  step_once(sched, done, steps)
  assert [step.decode_steps for step in steps] == [1, 3, 1]


def test_a_host_shaped_request_decodes_token_by_token():
  sched = make()
  params = api.SamplingParams(max_tokens=9, presence_penalty=1.0)
  sched.add(api.GenerateRequest("a", (1, 2), params))
  done, steps = {}, []
  while step_once(sched, done, steps):
    pass
  assert {step.decode_steps for step in steps} == {1} and len(done["a"]) == 9


def test_higher_priority_goes_first_and_preempts():
  sched = make(slots=1)
  sched.add(request("low", range(10), max_tokens=20))
  done = {}
  for _ in range(3):
    step_once(sched, done)
  sched.add(request("other", [9], priority=0))
  sched.add(request("high", range(30, 40), priority=1))
  while step_once(sched, done):
    pass
  assert list(done) == ["high", "low", "other"] and sched.preempted == 1
  assert done["low"] == [1010 + n for n in range(20)]


def test_a_greedy_session_does_not_starve_another():
  sched = make(slots=1)
  for n in range(6):
    sched.add(request(f"a{n}", range(10 * n, 10 * n + 8), 8, session="a"))
  done = {}
  for _ in range(4):
    step_once(sched, done)
  sched.add(request("b0", range(200, 204), 2, session="b"))
  sched.add(request("b1", range(300, 304), 2, session="b"))
  while step_once(sched, done):
    pass
  order = list(done)
  assert order.index("b0") <= 1 and order.index("b1") <= 3


def test_stop_token_and_context_end_a_request():
  sched = make(context=8)
  sched.add(request("stop", [1, 2], max_tokens=100, stop=(1003,)))
  sched.add(request("full", [3, 4], max_tokens=100))
  reasons = {}
  while (step := sched.schedule()) is not None:
    for index in range(step.decode_steps):
      ends = [live.length for live in step.decode]
      ends += [block.start + len(block.tokens) for block in step.blocks]
      tokens = [1000 + end for end in ends]
      for live, _ in sched.commit(step, tokens, index):
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


@pytest.mark.parametrize("recompute", [False, True])
def test_forget_restarts_prefills_and_keeps_what_has_sampled(recompute):
  sched = make()
  done = {}
  sched.add(request("old", range(10), max_tokens=20))
  for _ in range(3):
    step_once(sched, done)
  sched.add(request("new", range(50, 70)))
  step_once(sched, done)
  old, new = (sched._live[name] for name in ("old", "new"))
  kept = old.committed
  assert new.committed == 8 and not new.response and old.response
  sched.forget(recompute=recompute)
  assert new.committed == 0 and old.committed == (0 if recompute else kept)
  assert sched.cache.shared(list(range(10))) == 0
  while step_once(sched, done):
    pass
  assert done["old"] == [1010 + n for n in range(20)]
  assert done["new"] == [1020 + n for n in range(4)]


@pytest.mark.parametrize(
  "a, b, expected",
  [
    ([1, 2, 3], [1, 2, 4], 2),
    ([1], [1, 2], 1),
    ([], [1], 0),
    ([*range(200), 1], [*range(200), 2], 200),
  ],
)
def test_common_prefix(a, b, expected):
  assert prefix_cache.common_prefix(a, b) == expected
