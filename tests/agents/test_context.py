"""Context management: what is shown, what is kept, and what is trained on."""

import json

import pytest

from forge_jax import errors
from forge_jax.agents import base, context, react
from forge_jax.gateway import client, scripted

SEARCH = {
  "type": "function",
  "function": {
    "name": "search",
    "description": "Searches.",
    "parameters": {
      "type": "object",
      "properties": {"query": {"type": "string"}},
    },
  },
}


class Library:
  """Answers every search with a long page; ends at a reply without one."""

  tools = (SEARCH,)

  def __init__(self):
    self.seen = []

  def reset(self):
    return [
      {"role": "system", "content": "Search."},
      {"role": "user", "content": "Who was it?"},
    ]

  async def respond(self, reply):
    self.seen.append(reply)
    calls = reply.get("tool_calls")
    if not calls:
      return None
    return [
      {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": call["function"]["arguments"] + " page" * 40,
      }
      for call in calls
    ]


def call(name, **arguments):
  written = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{written}\n</tool_call>"


async def play(replies, **config):
  """An episode; (transcript, prompts as texts, completions, environment)."""
  environment = Library()
  with scripted.serve(replies) as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    keys = await admin.open_session("s", seed=1)
    agent = react.ReactAgent(context=context.ContextConfig(**config))
    endpoint = base.Endpoint(keys.base_url, keys.api_key, "policy", 400)
    transcript = await agent.run(environment, endpoint)
    completions, _ = await admin.close_session("s")
    await agent.aclose()
    await admin.aclose()
  decode = gateway.tokenizer.decode
  prompts = [decode(c.prompt_ids.tolist()) for c in completions]
  for completion, said in zip(completions, replies, strict=True):
    assert decode(completion.response_ids.tolist()) == said + "<|im_end|>"
  return transcript, prompts, completions, environment


SEARCHES = [call("search", query=f"q{n}") for n in range(3)]


async def test_without_management_every_request_extends_the_last():
  _, prompts, completions, _ = await play([*SEARCHES, "It was me."])
  assert [c.parent for c in completions] == [None, "s/0", "s/1", "s/2"]
  assert all(f"q{n}" in prompts[3] for n in range(3))


async def test_discard_all_drops_what_came_after_the_opening():
  # A token is a byte: the opening takes 217, a search and its page 292.
  transcript, prompts, completions, _ = await play(
    [*SEARCHES, "It was me."], strategy="discard_all", budget=1500
  )
  sizes = [len(c.prompt_ids) + len(c.response_ids) for c in completions]
  assert sizes[0] < 450 < sizes[1]  # 30% of the budget
  assert [c.parent for c in completions] == [None, "s/0", None, "s/2"]
  assert prompts[2] == prompts[0]
  roles = [m["role"] for m in transcript]
  assert roles == [
    *("system", "user", "assistant", "tool", "assistant", "tool", "context"),
    *("assistant", "tool", "assistant"),
  ]
  assert transcript[6]["content"] == "discard_all: 4 messages dropped"


async def test_truncate_shows_the_last_results_only():
  transcript, prompts, completions, _ = await play(
    [*SEARCHES, "It was me."], strategy="truncate", keep=1
  )
  assert "no longer shown" not in prompts[1]
  assert prompts[2].count("no longer shown") == 1
  assert prompts[3].count("no longer shown") == 2
  assert (
    prompts[3].count("page page")
    == 1 * 39 // 2 + prompts[3].count("page page") - 1 * 39 // 2
  )
  # What is omitted changes the past: a request branches before it.
  assert [c.parent for c in completions] == [None, "s/0", "s/0", "s/0"]
  notes = [m["content"] for m in transcript if m["role"] == "context"]
  assert notes == ["truncate: 1 messages dropped"] * 2


async def test_a_summary_is_the_policys_own_and_trained():
  replies = [SEARCHES[0], "q0 leads to q1.", SEARCHES[1], "none", "It was me."]
  transcript, prompts, completions, environment = await play(
    replies, strategy="summarise", budget=1000, threshold=0.25
  )
  # The question for it extends what was shown, so that nothing is read anew.
  assert completions[1].parent == "s/0"
  assert "Write down what you have found" in prompts[1]
  assert completions[2].parent is None
  assert "q0 leads to q1." in prompts[2] and " page" not in prompts[2]
  assert "Write down" not in prompts[2]
  roles = [m["role"] for m in transcript]
  assert roles[:8] == [
    *("system", "user", "assistant", "tool", "user", "assistant"),
    *("context", "user"),
  ]
  # The environment has no part in it.
  assert [bool(r.get("tool_calls")) for r in environment.seen] == [
    True,
    True,
    False,
  ]


async def test_the_model_may_decide_by_a_tool_call():
  both = call("search", query="q1") + "\n" + call("clear_context", note="N1")
  replies = [
    SEARCHES[0],
    call("clear_context", note="q0 is nothing"),
    both,
    "It was me.",
  ]
  transcript, prompts, completions, environment = await play(
    replies, strategy="tool"
  )
  assert "clear_context" in prompts[0]
  assert [c.parent is None for c in completions] == [True, False, True, True]
  assert "q0 is nothing" in prompts[2] and " page" not in prompts[2]
  assert "N1" in prompts[3] and "q0 is nothing" not in prompts[3]
  # The environment is asked for its own calls, and not about the context.
  names = [
    [c["function"]["name"] for c in r.get("tool_calls", [])]
    for r in environment.seen
  ]
  assert names == [["search"], ["search"], []]
  assert sum(m["role"] == "context" for m in transcript) == 2


@pytest.mark.parametrize("arguments", ["{", "[]", '{"note": 3}', None])
def test_a_note_that_cannot_be_read_is_empty(arguments):
  one = context.Context(context.ContextConfig(strategy="tool"), [])
  function = {"name": "clear_context", "arguments": arguments}
  reply = {
    "role": "assistant",
    "tool_calls": [{"id": "a", "function": function}],
  }
  assert one.take_action(reply) == ({"role": "assistant"}, "")


def test_the_tool_is_the_environments_where_it_is_not_ours():
  one = context.Context(context.ContextConfig(), [])
  function = {"name": "clear_context", "arguments": "{}"}
  reply = {
    "role": "assistant",
    "tool_calls": [{"id": "a", "function": function}],
  }
  assert one.take_action(reply) == (reply, None)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"strategy": "forget"}, "'forget'; expected one of none, discard_all"),
    ({"budget": 0}, "budget is 0"),
    ({"threshold": 1.5}, "threshold 1.5"),
  ],
)
def test_a_configuration_that_cannot_work(config, message):
  with pytest.raises(errors.ConfigError, match=message):
    context.ContextConfig(**config)
