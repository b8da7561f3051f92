"""The records domain, played by its scripts."""

import asyncio

import pytest

from forge_jax import errors
from forge_jax.agents import scripted
from forge_jax.tasks import records, tool_calls


def play(domain, task, policy):
  """(the transcript, rewards) of a script's episode."""
  environment = domain.environment(task)
  agent = scripted.ScriptedAgent(domain.script(task, policy))
  return asyncio.run(agent.run(environment)), environment.rewards()


def turns(transcript):
  return sum(message["role"] == "assistant" for message in transcript)


@pytest.mark.parametrize("policy", ["optimal", "sequential", "malformed"])
def test_scripts_that_look_up_find_the_names(policy):
  domain = records.Records(records.RecordsConfig(hops=(1, 3), padding=3))
  for split in ("train", "heldout"):
    for index in range(20):
      task = domain.task(split, index)
      transcript, rewards = play(domain, task, policy)
      assert [(r.name, r.value) for r in rewards] == [("answer", 1.0)]
      starts, hops = len(task.payload["chains"]), len(task.payload["chains"][0])
      want = {
        "optimal": hops,
        "sequential": starts * (hops - 1) + 1,
        "malformed": hops + 1,
      }
      assert turns(transcript) == want[policy]


def test_who_looks_nothing_up_finds_nothing():
  domain = records.Records(records.RecordsConfig(starts=(3, 3)))
  assert not any(
    play(domain, domain.task("train", i), "random")[1] for i in range(30)
  )


def test_an_unknown_policy_is_refused():
  domain = records.Records(records.RecordsConfig())
  with pytest.raises(errors.ConfigError, match="no script for 'clever'"):
    domain.script(domain.task("train", 0), "clever")


def test_what_cannot_be_looked_up_is_an_error_to_read():
  domain = records.Records(records.RecordsConfig(starts=(1, 1)))
  environment = domain.environment(domain.task("train", 3))
  calls = tool_calls.call(("look", {"name": "none"}), ("see", {}))
  calls["tool_calls"][1]["function"]["arguments"] = "{"
  answers = asyncio.run(environment.respond(calls))
  assert {a["content"] for a in answers} == {"error: nothing is known of it"}


def test_calls_of_one_reply_take_the_time_of_one(monkeypatch):
  waits = []

  async def sleep(seconds):
    waits.append(seconds)

  monkeypatch.setattr(asyncio, "sleep", sleep)
  domain = records.Records(records.RecordsConfig(starts=(3, 3), seconds=0.2))
  play(domain, domain.task("train", 0), "optimal")
  assert waits == [0.2]
  play(domain, domain.task("train", 0), "sequential")
  assert waits == [0.2] * 4


def test_harder_questions_have_more_hops():
  easy = records.Records(records.RecordsConfig())
  assert easy.at(2).task("train", 0).payload["question"].startswith("Follow 3:")


@pytest.mark.parametrize(
  ("values", "found"),
  [
    ({"starts": (2, 1)}, r"starts=\(2, 1\)"),
    ({"hops": (1, 99)}, "need more"),
    ({"names": 3, "starts": (1, 2)}, "need more than the 3 names"),
    ({"names": 97}, "there are 96"),
  ],
)
def test_what_cannot_work_is_refused(values, found):
  with pytest.raises(errors.ConfigError, match=found):
    records.RecordsConfig(**values)


def test_few_names_are_all_that_occur():
  domain = records.Records(records.RecordsConfig(names=6, starts=(2, 2)))
  tasks = [domain.task("train", index) for index in range(40)]
  seen = {
    n for task in tasks for chain in task.payload["chains"] for n in chain
  }
  assert seen == set(records.NAMES[:6])
