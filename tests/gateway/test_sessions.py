"""Lineages, with a renderer that writes one number per message."""

import json

import pytest

from forge_jax import types
from forge_jax.gateway import addition, attempts, refusal, sessions, turns


class Numbers:
  """Renders a message as its length; extends unless told not to."""

  extends = True

  def render(self, messages, tools):
    return addition.Addition.of([len(m["content"] or "") for m in messages])

  def extend(self, prompt_ids, response_ids, conversation, new, *others):
    return self.render(new, ()) if self.extends else None


def user(text):
  return {"role": "user", "content": text}


def assistant(text, **kwargs):
  return {"role": "assistant", "content": text, **kwargs}


def ask(session, messages, reply=None, tools=(), renderer=None):
  """One request and its reply; returns the plan."""
  plan = session.begin(renderer or Numbers(), messages, tools)
  session.record(
    plan,
    response_ids=[100 + plan.number, 7],
    logprobs=[-0.5, -0.25],
    versions=[0, 1],
    stop_reason=types.StopReason.STOP,
    reply=reply,
  )
  return plan


@pytest.fixture
def session():
  return sessions.Session("s", seed=3, sampling={})


def test_the_deepest_conversation_is_extended(session):
  ask(session, [user("a")], assistant("x"))
  history = [user("a"), assistant("x"), user("bb")]
  ask(session, history, assistant("y"))
  history += [assistant("y"), user("ccc")]
  plan = ask(session, history, assistant("z"))
  assert plan.prompt_ids.tolist() == [1, 100, 7, 2, 101, 7, 3]
  assert plan.added_ids.tolist() == [3]
  completions = session.completions()
  assert [c.parent for c in completions] == [None, "s/0", "s/1"]
  assert completions[2].prompt_ids.tolist() == plan.prompt_ids.tolist()
  assert completions[0].versions.tolist() == [0, 1]
  assert not session.fork_reasons


def test_a_branch_leaves_from_its_node(session):
  ask(session, [user("a")], assistant("x"))
  for text in ("one", "two!"):
    ask(session, [user("a"), assistant("x"), user(text)], assistant(text))
  parents = [c.parent for c in session.completions()]
  assert parents == [None, "s/0", "s/0"]
  assert not session.fork_reasons


def test_a_fresh_request_is_a_root_without_a_reason(session):
  ask(session, [user("a")], assistant("x"))
  few_shot = [user("q"), assistant("an example"), user("b")]
  for messages in ([user("a")], [user("b")], few_shot, few_shot):
    assert ask(session, messages, assistant("w")).parent is None
  assert not session.fork_reasons


def reasons(session, messages, **kwargs):
  plan = ask(session, messages, **kwargs)
  return (plan.parent.number if plan.parent else None, plan.fork_reason)


def test_why_a_replay_does_not_extend(session):
  ask(session, [user("a")], assistant("x"))
  ask(session, [user("a"), assistant("x"), user("b")], assistant("y"))
  changed = [user("a"), assistant("X"), user("b")]
  assert reasons(session, changed) == (None, "reply")
  # The first turn still matches: the request branches off there.
  late = [user("a"), assistant("x"), user("b"), assistant("Y"), user("c")]
  assert reasons(session, late) == (0, "reply")
  rewritten = [user("summary"), assistant("y"), user("c")]
  assert reasons(session, rewritten) == (None, "history")
  tools = [{"type": "function", "function": {"name": "f"}}]
  again = [user("a"), assistant("x"), user("b"), assistant("y"), user("c")]
  assert reasons(session, again, tools=tools) == (None, "tools")
  stubborn = Numbers()
  stubborn.extends = False
  assert reasons(session, again, renderer=stubborn) == (None, "template")
  assert session.fork_reasons == {
    "reply": 2,
    "history": 1,
    "tools": 1,
    "template": 1,
  }
  assert session.completions()[2].fork_reason == "reply"


def test_how_a_client_writes_a_turn_does_not_matter(session):
  call = {"id": "1", "type": "function"}
  said = {**call, "function": {"name": "f", "arguments": '{"a": 1, "b": 2}'}}
  sent = {"id": "9", "function": {"arguments": '{"b":2,"a":1}', "name": "f"}}
  ask(session, [user("a")], assistant(None, tool_calls=[said]))
  replay = assistant("", tool_calls=[sent], refusal=None)
  plan = ask(session, [user("a"), replay, {"role": "tool", "content": "3"}])
  assert plan.parent.number == 0
  other = {**sent, "function": {"name": "f", "arguments": '{"a":1,"b":3}'}}
  messages = [user("a"), assistant("", tool_calls=[other]), user("b")]
  assert reasons(session, messages) == (None, "reply")


def tool_call(arguments, id):
  function = {"name": "f", "arguments": arguments}
  return {"id": id, "type": "function", "function": function}


def test_a_turn_that_comes_back_otherwise_keeps_what_follows_it(session):
  said = assistant("Look.", tool_calls=[tool_call('{"a": 1}', "call_0_0")])
  done = {"role": "tool", "content": "3", "tool_call_id": "call_0_0"}
  ask(session, [user("a")], {**said, "reasoning_content": "Hm.\n"})
  ask(session, [user("a"), said, done], assistant("y"))
  for number, replay in enumerate(
    [
      assistant("", tool_calls=[tool_call('{"a":1.0}', "call_9")]),
      assistant(" Look.", tool_calls=[tool_call('{"a":1,"b":0}', "call_0_0")]),
      {**said, "reasoning_content": "Hm."},
    ]
  ):
    messages = [user("a"), replay, done, assistant("y\n"), user("more")]
    assert reasons(session, messages, reply=assistant(f"z{number}")) == (
      1,
      None,
    )
  # Each of the three goes on, however its past is written this time.
  messages = [user("a"), said, done, assistant("y"), user("more")]
  for number in range(3):
    again = [*messages, assistant(f"z{number}"), user("go on")]
    assert reasons(session, again) == (2 + number, None)


def test_what_is_extended_is_shown_as_it_was_sampled(session):
  said = assistant("Look.", tool_calls=[tool_call('{"a": 1}', "call_0_0")])
  said["reasoning_content"] = "Hm."
  ask(session, [user("a")], said)
  seen = []

  class Shown(Numbers):
    def extend(self, prompt_ids, response_ids, conversation, *others):
      seen.extend(conversation)
      return super().extend(prompt_ids, response_ids, conversation, *others)

  replay = assistant("", tool_calls=[tool_call('{"a":1}', "toolu_1")])
  ask(session, [user("a"), replay, user("b")], renderer=Shown())
  assert seen == [user("a"), said]


def test_of_equal_replies_the_one_whose_ids_come_back_is_extended(session):
  for number in range(3):
    call = tool_call("{}", f"call_{number}_0")
    ask(session, [user("a")], assistant("", tool_calls=[call]))
  for number in (1, 0, 2):
    call = tool_call("{}", f"call_{number}_0")
    messages = [user("a"), assistant("", tool_calls=[call]), user("b")]
    assert reasons(session, messages) == (number, None)
  other = assistant("", tool_calls=[tool_call("{}", "toolu_1")])
  assert reasons(session, [user("a"), other, user("b")]) == (2, None)


def test_a_reply_that_is_left_out_is_a_branch_with_a_reason(session):
  ask(session, [user("a")], assistant("x"))
  history = [user("a"), assistant("x"), user("b")]
  ask(session, history, assistant("malformed"))
  ask(session, [*history, user("Call a tool!")], assistant("y"))
  assert session.completions()[2].parent == "s/0"
  assert session.fork_reasons == {"omitted": 1}
  history += [user("Call a tool!"), assistant("y"), user("c")]
  assert reasons(session, history) == (2, None)


def test_tools_in_another_order_are_the_same_tools(session):
  tools = [{"type": "function", "function": {"name": n}} for n in "ab"]
  ask(session, [user("a")], assistant("x"), tools=tools)
  history = [user("a"), assistant("x"), user("b")]
  assert reasons(session, history, tools=tools[::-1]) == (0, None)
  between = [tools[0], {"type": "function", "function": {"name": "new"}}]
  grown = [*between, tools[1]]
  assert reasons(session, history, tools=grown, reply=assistant("y")) == (
    None,
    "tools",
  )
  history += [assistant("y"), user("c")]
  assert reasons(session, history, tools=grown) == (2, None)


def test_a_search_reads_a_message_once(session, monkeypatch):
  """Whatever the number of completions, of branches and of turns before."""
  history = [user("a")]
  for number in range(100):
    ask(session, history, assistant(f"x{number}"))
    history += [assistant(f"x{number}"), user(str(number))]
  compared = []
  likeness = turns.likeness
  monkeypatch.setattr(
    turns, "likeness", lambda *pair: compared.append(pair) or likeness(*pair)
  )
  plan = ask(session, history)
  assert plan.parent.number == 99 and len(compared) == 100


def test_an_undelivered_reply_is_kept_but_not_extended(session):
  ask(session, [user("a")], reply=None)
  plan = ask(session, [user("a"), assistant("x"), user("b")])
  assert plan.parent is None and plan.fork_reason is None
  assert len(session.completions()) == 2


def test_completions_come_in_the_order_of_requests(session):
  first = session.begin(Numbers(), [user("a")], ())
  ask(session, [user("b")], assistant("y"))
  assert session.running == ("s/0",)
  session.record(
    first,
    response_ids=[5],
    logprobs=[-1.0],
    versions=[0],
    stop_reason=types.StopReason.LENGTH,
    reply=assistant("x"),
  )
  assert session.running == ()
  completions = session.completions()
  assert [c.id for c in completions] == ["s/0", "s/1"]
  assert completions[0].started <= completions[1].started
  assert completions[0].finished >= completions[1].finished


def test_seeds_of_requests():
  seeds = {sessions.request_seed(s, n) for s in range(50) for n in range(50)}
  assert len(seeds) == 2500
  assert all(0 <= seed < 2**31 for seed in seeds)
  assert sessions.request_seed(3, 4) == sessions.request_seed(3, 4)


def seeds_by_agent(order):
  """The seeds of an episode in which agents ask in this order; "m" is main."""
  session, seeds = sessions.Session("s", seed=3, sampling={}), {}
  for name in order:
    client_ids = {} if name == "m" else {attempts.SUB_AGENT: name}
    caller = attempts.Caller("", "m", "d", client_ids, 0, 0.0)
    attempt = session.attempts.begin(caller)
    plan = session.begin(Numbers(), [user("a")], (), attempt=attempt)
    seeds.setdefault(name, []).append(plan.seed)
  return seeds


def test_seeds_of_sub_agents_do_not_depend_on_who_asks_first():
  found = seeds_by_agent("maabbm")
  assert found == seeds_by_agent("mbabam") == seeds_by_agent("mabbam")
  assert len({seed for seeds in found.values() for seed in seeds}) == 6
  assert found["m"] == seeds_by_agent("mm")["m"]


def test_a_closed_session_takes_nothing(session):
  session.closed = True
  with pytest.raises(refusal.Refusal, match="'s' is closed"):
    session.begin(Numbers(), [user("a")], ())


def test_the_forest_adds_up_to_the_prompts(session):
  ask(session, [user("a")], assistant("x"))
  ask(session, [user("a"), assistant("x"), user("bb")], assistant("y"))
  nodes = {n["id"]: n for n in json.loads(json.dumps(session.forest_json()))}
  ids, name = [], "s/1/prompt"
  while name is not None:
    ids = nodes[name]["token_ids"] + ids
    name = nodes[name]["parent"]
  assert ids == session.completions()[1].prompt_ids.tolist()
  assert session.summary()["completions"] == 2
