"""Deep search: questions that tools alone can answer, and their verifier."""

import json
import random

import pytest

from forge_jax import errors, types
from forge_jax.tasks import answers, corpus, deep_search, tool_calls

PERF, PROCESS = types.Component.PERF, types.Component.PROCESS


def domain(**config):
  return deep_search.DeepSearch(deep_search.DeepSearchConfig(**config))


def play(environment, replies):
  """What the tools answered."""
  said = []
  for reply in replies:
    results = environment.respond(reply)
    said += [m["content"] for m in results or ()]
  return said


def call(name, **arguments):
  return tool_calls.call((name, arguments))


def total(rewards, component=PERF):
  return sum(r.value for r in rewards if r.component == component)


def test_pages_are_of_the_documentation():
  pages = corpus.load().pages
  page = pages["json.decoder.JSONDecodeError"]
  assert "lineno: The line corresponding to pos" in page.text
  assert page.links == {"module": "json.decoder", "base": "builtins.ValueError"}
  assert "shutil.copytree" in pages["shutil"].text
  assert len(pages) > 1000
  for page in pages.values():
    assert set(page.links.values()) <= set(pages)
    assert " at 0x" not in page.text


def test_a_search_finds_what_begins_so():
  library = corpus.load()
  assert library.search("recursively copy a directory tree", 3)[0] == (
    "shutil.copytree"
  )
  assert library.search('"); -- *', 3) == []
  starts = random.Random(0).sample(deep_search._starts(), 100)
  found = [
    title in library.search(library.pages[title].summary, 5) for title in starts
  ]
  assert sum(found) >= 98


@pytest.mark.parametrize("level", [0, 1, 3])
def test_every_question_can_be_answered_from_what_tools_show(level):
  searching = domain(level=level)
  for index in range(40):
    task = searching.task("train", index)
    assert len(set(task.payload["pages"])) == level + 1
    environment = searching.environment(task)
    said = play(environment, searching.script(task, "optimal"))
    assert environment.rewards() == [types.Reward("answer", PERF, 1.0)]
    # Every name that the way takes was shown.
    text = "\n".join(said)
    for title in (*task.payload["pages"][1:], task.payload["answer"]):
      assert title in text
    assert not any(result.startswith("error") for result in said)
    random_one = searching.environment(task)
    play(random_one, searching.script(task, "random"))
    assert total(random_one.rewards()) < 0.5


def test_splits_and_seeds():
  one, other = domain(seed=0), domain(seed=1)
  questions = {
    (seed, split): [
      searching.task(split, n).payload["question"] for n in range(60)
    ]
    for seed, searching in enumerate((one, other))
    for split in ("train", "heldout")
  }
  assert questions[0, "heldout"] == questions[1, "heldout"]
  assert questions[0, "train"] != questions[1, "train"]
  assert not set(questions[0, "heldout"]) & {
    *questions[0, "train"],
    *questions[1, "train"],
  }
  with pytest.raises(errors.ConfigError, match="no split 'test'"):
    one.task("test", 0)
  assert len(one.at(4).task("train", 0).payload["pages"]) == 5


def test_a_guess_is_worth_what_was_read():
  searching = domain(level=1)
  task = searching.task("train", 3)
  first, last = task.payload["pages"]
  right = answers.reply(f"`{task.payload['answer']}`")

  def rewards(*replies):
    environment = searching.environment(task)
    play(environment, replies)
    return environment.rewards()

  opens = [call("open_page", title=t) for t in (first, last)]
  assert total(rewards(*opens, right)) == 1.0
  assert total(rewards(opens[1], right)) == 1.0
  assert rewards(opens[0], right) == [types.Reward("reached", PERF, 0.15)]
  assert rewards(*opens, answers.reply("no")) == [
    types.Reward("reached", PERF, 0.3)
  ]
  assert rewards(right) == []
  assert rewards({"content": "Perhaps."}) == [
    types.Reward("no_answer", PROCESS, -0.1)
  ]


def test_a_malformed_call_is_a_result_and_costs_once():
  searching = domain(page_chars=100)
  environment = searching.environment(searching.task("train", 0))
  said = play(
    environment,
    [
      call("open_page", title="shutil", part=2),
      call("open_page", title="shutil", part=99),
      call("open_page", title="nowhere"),
      call("open_page", part=2),
      call("search", query="zip", most=9),
      call("fly"),
      {
        "tool_calls": [
          {"id": "0", "function": {"name": "search", "arguments": "{"}}
        ]
      },
    ],
  )
  assert "part 2 of" in said[0] and len(said[0]) < 130
  assert said[1].startswith("error: shutil has the parts 1 to ")
  assert said[2] == "error: there is no page 'nowhere'"
  assert len(set(said[3:])) == 1 and said[3].startswith(
    "error: expected search"
  )
  assert environment.rewards() == [
    types.Reward("no_answer", PROCESS, -0.1),
    types.Reward("malformed", PROCESS, -0.1),
  ]


def test_more_hops_take_more_text():
  """At some level an agent that forgets nothing is past any context."""
  lengths = []
  for level in (0, 2, 5):
    searching = domain(level=level)
    total_chars = 0
    for index in range(10):
      task = searching.task("heldout", index)
      said = play(
        searching.environment(task), searching.script(task, "optimal")
      )
      total_chars += len("".join(said)) + len(json.dumps(task.payload))
    lengths.append(total_chars / 10)
  assert lengths == sorted(lengths) and lengths[-1] > 2 * lengths[0], lengths


def test_what_cannot_be_is_refused():
  with pytest.raises(errors.ConfigError, match=r"deep_search\.level is -1"):
    domain(level=-1)
