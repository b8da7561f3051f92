"""Deep search: questions whose answer is several pages of a corpus away.

The corpus is the documentation of the standard library (`corpus`), behind two
tools: `search`, and `open_page`, which shows a part of a page. A question
describes a thing by how its documentation begins and asks for what is some
relations away:

  What is the full name of the last function, in alphabetical order, of the
  module that defines the class whose documentation begins with "..."?

Each relation can be read on one page, and no page is needed twice: The
number of these pages is the number of hops. The more of them, the more text an agent
gathers, so that at some length only one that manages its context gets through.

Splits: train, heldout; see `splits`. Difficulty: `level` + 1 hops.

Rewards:
  answer     perf +1.0     the right answer, after the last of the pages was shown
  reached    perf up to +0.3  without that, times the share of the pages shown
  no_answer  process -0.1  the last reply has no <answer>...</answer>
  malformed  process -0.1  once, if a call was no call of a tool that there is
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import random
from typing import Any

from forge_jax import errors, types
from forge_jax.tasks import answers, base, corpus, splits, tool_calls

_SYSTEM = (
  "You answer questions about the documentation of a programming language's "
  "library. Use the tools to find the pages that you need; the documentation, "
  "not your memory, is right. Then reply, without calling a tool, with the "
  "answer alone, as <answer>...</answer>."
)
_LEAST_SUMMARY = 30  # characters by which a thing can be described


@dataclasses.dataclass(frozen=True, slots=True)
class DeepSearchConfig:
  """How far away answers are, and what the tools show."""

  level: int = 0  # an answer is level + 1 hops away
  results: int = 5  # of a search
  page_chars: int = 1500  # of a page that are shown at a time
  seed: int = 0  # of the train split only
  max_tokens: int = 256  # most new tokens of a reply

  def __post_init__(self):
    least = {"level": 0, "results": 1, "page_chars": 1, "max_tokens": 1}
    for name, value in least.items():
      if getattr(self, name) < value:
        raise errors.ConfigError(
          f"deep_search.{name} is {getattr(self, name)}; expected at least "
          f"{value}"
        )


class DeepSearch:
  """The domain; see the module's docstring."""

  name = "deep_search"

  def __init__(self, config: DeepSearchConfig):
    """The corpus is read when the first task is asked for."""
    self._config = config
    self.max_tokens = config.max_tokens

  def at(self, level: int) -> "DeepSearch":
    """The same domain with tasks of another difficulty."""
    return DeepSearch(dataclasses.replace(self._config, level=level))

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task.

    Its payload has the question, how the documentation begins that it
    describes a thing by, the pages to be read, in order, and the answer.

    Raises:
      ConfigError: there is no such split, or the index is negative.
    """
    make = functools.partial(_draw, self._config.level + 1)
    return splits.draw(self.name, split, index, self._config.seed, make)

  def environment(self, task: types.Task) -> "DeepSearchEnvironment":
    """A fresh environment for one episode of the task."""
    return DeepSearchEnvironment(task.payload, self._config)

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What the policy "random" or "optimal" replies.

    Optimal: one search, every page of the way, the answer. Random: some pages
    of all that there are, and the name of one.
    """
    pages = corpus.load().pages
    if policy == "optimal":
      titles, answer = task.payload["pages"], task.payload["answer"]
    else:
      rng = random.Random(task.id)
      titles = rng.sample(list(pages), 4)
      answer = rng.choice(titles)
    size = self._config.page_chars
    return [
      tool_calls.call(("search", {"query": task.payload["begins"]})),
      *(
        tool_calls.call(("open_page", {"title": title, "part": part}))
        for title in titles
        for part in range(1, len(_parts(pages[title].text, size)) + 1)
      ),
      answers.reply(answer),
    ]


class DeepSearchEnvironment:
  """One question, the tools, and the verifier. Calls may come at once."""

  def __init__(self, payload: Mapping[str, Any], config: DeepSearchConfig):
    self._payload = payload
    self._config = config
    self._corpus = corpus.load()
    self._shown: set[str] = set()  # titles of pages that were opened
    self._answer: str | None = None
    self._malformed = False

  @property
  def tools(self) -> Sequence[types.Message]:
    """`search` and `open_page`."""
    return [
      base.tool(
        "search", "Finds pages by words in them.", {"query": base.TEXT}
      ),
      base.tool(
        "open_page",
        "Shows a part of a page. Parts are numbered from 1.",
        {"title": base.TEXT, "part": {"type": "integer"}},
        optional=("part",),
      ),
    ]

  def reset(self) -> types.Messages:
    return [
      {"role": "system", "content": _SYSTEM},
      {"role": "user", "content": self._payload["question"]},
    ]

  def respond(self, reply: types.Message) -> types.Messages | None:
    """The results of the calls; None: there are none, and that is the answer."""
    calls = reply.get("tool_calls") or []
    if not calls:
      self._answer = answers.find(reply.get("content") or "")
      return None
    return [
      {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": self._result(call["function"]),
      }
      for call in calls
    ]

  def rewards(self) -> Sequence[types.Reward]:
    pages = self._payload["pages"]
    # Without the last page an answer is a guess, or memory.
    right = self._answer is not None and pages[-1] in self._shown
    right = right and _plain(self._answer) == _plain(self._payload["answer"])
    share = sum(title in self._shown for title in pages) / len(pages)
    rewards = []
    if right:
      rewards.append(types.Reward("answer", types.Component.PERF, 1.0))
    elif share:
      rewards.append(types.Reward("reached", types.Component.PERF, 0.3 * share))
    process = {
      "no_answer": self._answer is None,
      "malformed": self._malformed,
    }
    return rewards + [
      types.Reward(name, types.Component.PROCESS, -0.1)
      for name, happened in process.items()
      if happened
    ]

  def _result(self, function: Mapping[str, Any]) -> str:
    try:
      arguments = json.loads(function["arguments"])
      match function["name"], arguments:
        case "search", {"query": str(query), **rest} if not rest:
          return self._search(query)
        case "open_page", {"title": str(title), **rest} if not (
          rest.keys() - {"part"}
        ):
          return self._open(title, rest.get("part", 1))
    except (ValueError, TypeError):
      pass
    self._malformed = True
    return "error: expected search(query) or open_page(title, part)"

  def _search(self, query: str) -> str:
    found = self._corpus.search(query, self._config.results)
    lines = [f"{t}: {self._corpus.pages[t].summary}" for t in found]
    return "\n".join(lines) or "nothing found"

  def _open(self, title: str, part: Any) -> str:
    page = self._corpus.pages.get(title)
    if page is None:
      return f"error: there is no page {title!r}"
    parts = _parts(page.text, self._config.page_chars)
    if type(part) is not int or not 1 <= part <= len(parts):
      return f"error: {title} has the parts 1 to {len(parts)}"
    self._shown.add(title)
    more = f"\n[part {part} of {len(parts)}]" if len(parts) > 1 else ""
    return parts[part - 1] + more


def _parts(text: str, size: int) -> list[str]:
  """A text in parts of at most `size` characters, cut at spaces if it can be."""
  parts = []
  while len(text) > size:
    cut = max(text.rfind(" ", 1, size), text.rfind("\n", 1, size))
    cut = cut + 1 if cut > 0 else size
    parts.append(text[:cut])
    text = text[cut:]
  return [*parts, text]


def _plain(answer: str) -> str:
  """An answer without what models write around names."""
  return answer.strip(" `'\"\n").removesuffix("()").removesuffix(".")


def _draw(hops: int, rng: random.Random) -> dict[str, Any]:
  """A question: a walk over the corpus from a thing that words describe."""
  pages, starts = corpus.load().pages, _starts()
  while True:
    start = pages[rng.choice(starts)]
    walk = _walk(rng, start, hops)
    if walk is not None:
      phrase, read, answer = walk
      return {
        "question": f"What is the full name of {phrase}?",
        "begins": start.summary,
        "pages": read,
        "answer": answer,
      }


@functools.cache
def _starts() -> tuple[str, ...]:
  """Titles of the pages that alone begin as they do."""
  pages = corpus.load().pages.values()
  counts = collections.Counter(page.summary for page in pages)
  return tuple(
    page.title
    for page in pages
    if len(page.summary) >= _LEAST_SUMMARY and counts[page.summary] == 1
  )


def _walk(
  rng: random.Random, start: corpus.Page, hops: int
) -> tuple[str, list[str], str] | None:
  """Words for what is some hops away, the pages to be read, and its name.

  None: the walk came to an end too soon.
  """
  pages, page, read = corpus.load().pages, start, []
  phrase = f'the {page.kind} whose documentation begins with "{page.summary}"'
  for _ in range(hops):
    steps = [step for step in _steps(page) if step[1] not in read]
    if not steps:
      return None
    words, title, answer = rng.choice(steps)
    phrase = words.format(phrase)
    read.append(title)
    page = pages[answer]
  return phrase, read, page.title


def _steps(page: corpus.Page) -> list[tuple[str, str, str]]:
  """Relations of a page: words, the page they are read on, and whose they are."""
  pages, steps = corpus.load().pages, []
  if "base" in page.links:
    steps.append(("the base class of {}", page.title, page.links["base"]))
  module, of = page, "{}"
  if page.kind != "module":
    module = pages.get(page.links.get("module", ""))
    of = "the module that defines {}"
  for relation, title in module.links.items() if module else ():
    which, kind = relation.split()
    if title != page.title:
      words = f"the {which} {kind}, in alphabetical order, of {of}"
      steps.append((words, module.title, title))
  return steps
