"""General QA: extractive questions over the standard library's documentation.

A passage holds what `pydoc` says of several functions of one module; questions
and their answers are made from it by program:
  does       what a function does, in the passage's words
  which      which function it is that does something
  default    a parameter's default value
  parameter  a function's first, second, third parameter

Splits: train, heldout, whose modules do not occur in train; see `splits`.
Difficulty: a passage has 2 + 3 * level functions. The documentation is that of
the Python that runs this, so tasks differ between versions of Python.

Rewards:
  answer     perf +1.0     its words are the truth's, but for articles,
                           punctuation and, where it is not code, case
  overlap    perf +0.3 F1  of the words, if they are not
  no_answer  process -0.1  the reply has no <answer>...</answer>
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib
import inspect
import pydoc
import random
import re
from typing import Any

from forge_jax import errors, types
from forge_jax.tasks import answers, splits

_MODULES = {
  "train": (
    *("base64", "bisect", "calendar", "csv", "difflib", "fnmatch"),
    *("functools", "glob", "json", "math", "operator", "pprint", "random"),
    *("secrets", "statistics", "struct", "zlib"),
  ),
  "heldout": ("heapq", "os.path", "shutil", "tempfile", "textwrap"),
}
_ORDINALS = ("first", "second", "third")
_MOST_CHARS = 200  # of what a function does, as far as it is asked for


@dataclasses.dataclass(frozen=True, slots=True)
class LibraryQAConfig:
  """How much there is to read."""

  level: int = 0
  seed: int = 0  # of the train split only
  max_tokens: int = 128  # most new tokens of a reply

  def __post_init__(self):
    if self.level < 0:
      raise errors.ConfigError(
        f"library_qa level is {self.level}; expected at least 0"
      )


class LibraryQA:
  """The domain; see the module's docstring."""

  name = "library_qa"

  def __init__(self, config: LibraryQAConfig):
    self._config = config
    self.max_tokens = config.max_tokens

  def at(self, level: int) -> "LibraryQA":
    """The same domain with tasks of another difficulty."""
    return LibraryQA(dataclasses.replace(self._config, level=level))

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; its payload has question, answer and is_code."""
    make = functools.partial(_make, split, 2 + 3 * self._config.level)
    return splits.draw(
      self.name, split, index, self._config.seed, make, disjoint=True
    )

  def environment(self, task: types.Task) -> "LibraryQuestion":
    """A fresh environment for one episode of the task."""
    payload = task.payload
    return LibraryQuestion(
      payload["question"], payload["answer"], payload["is_code"]
    )

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What the policy "random" or "optimal" replies; random: any word."""
    if policy == "optimal":
      return [answers.reply(task.payload["answer"])]
    words = re.findall(r"\w+", task.payload["question"])
    return [answers.reply(random.Random(task.id).choice(words))]


class LibraryQuestion(answers.Question):
  """One question and its verifier."""

  def __init__(self, question: str, truth: str, is_code: bool):
    super().__init__(question)
    self._truth = truth
    self._is_code = is_code

  def rewards(self) -> Sequence[types.Reward]:
    """What the answer is worth."""
    if self.answer is None:
      return self.unanswered
    if self._is_code:
      right = self.answer.strip("`") == self._truth
      share = 0.0
    else:
      right = answers.words(self.answer) == answers.words(self._truth)
      share = answers.overlap(self.answer, self._truth)
    perf = types.Component.PERF
    if right:
      return [types.Reward("answer", perf, 1.0)]
    return [types.Reward("overlap", perf, 0.3 * share)] if share else []


@dataclasses.dataclass(frozen=True, slots=True)
class _Function:
  """What pydoc says of a function, and what can be asked about it."""

  name: str
  text: str  # signature and description
  does: str
  parameters: tuple[tuple[str, str | None], ...]  # name and default's text


def _make(split: str, count: int, rng: random.Random) -> dict[str, Any]:
  """Draws a passage and a question about one of its functions."""
  module = rng.choice(_MODULES[split])
  known = _functions(module)
  chosen = rng.sample(known, min(count, len(known)))
  function = rng.choice(chosen)
  asked = rng.choice(_KINDS)(rng, function) or _which(rng, function)
  question, answer, is_code = asked
  passage = "\n\n".join(function.text for function in chosen)
  return {
    "question": f"From the documentation of Python's module {module}:\n\n"
    f"{passage}\n\n{question}",
    "answer": answer,
    "is_code": is_code,
  }


# Question, answer and whether that is code; None: this cannot be asked.
_Asked = tuple[str, str, bool] | None


def _does(rng: random.Random, function: _Function) -> _Asked:
  del rng
  question = f"What does {function.name} do? Quote the first sentence."
  return question, function.does, False


def _which(rng: random.Random, function: _Function) -> _Asked:
  del rng
  question = f"Which function is it that does this: {function.does}"
  return question, function.name, True


def _default(rng: random.Random, function: _Function) -> _Asked:
  optional = [p for p in function.parameters if p[1] is not None]
  if not optional:
    return None
  name, default = rng.choice(optional)
  return f"What is the default of {name} in {function.name}?", default, True


def _parameter(rng: random.Random, function: _Function) -> _Asked:
  count = min(len(function.parameters), len(_ORDINALS))
  if not count:
    return None
  place = rng.randrange(count)
  question = f"What is the {_ORDINALS[place]} parameter of {function.name}?"
  return question, function.parameters[place][0], True


_KINDS: tuple[Callable[[random.Random, _Function], _Asked], ...] = (
  _does,
  _which,
  _default,
  _parameter,
)


@functools.cache
def _functions(module: str) -> tuple[_Function, ...]:
  """The documented functions of a module, none with the words of another."""
  found = {}
  for name, value in inspect.getmembers(importlib.import_module(module)):
    if name.startswith("_") or not inspect.isroutine(value):
      continue
    function = _read(name, value)
    if function is not None:
      found.setdefault(function.does, function)
  return tuple(found.values())


def _read(name: str, value: Any) -> _Function | None:
  """A function by its pydoc page; None: nothing there can be asked about."""
  page = pydoc.plain(pydoc.render_doc(value)).split("\n\n")
  signature, _, body = "\n\n".join(page[1:]).partition("\n")
  description = inspect.cleandoc(body).split("\n\n")[0].replace("\n", " ")
  does = re.split(r"(?<=\.)\s", description)[0]
  try:
    parameters = inspect.signature(value).parameters.values()
  except ValueError:  # a function of C without a signature
    return None
  if not 15 <= len(does) <= _MOST_CHARS or not signature.startswith(name):
    return None
  if " at 0x" in signature:  # an address differs from run to run
    return None
  return _Function(
    name=name,
    text=f"{signature}\n    {does}",
    does=does,
    parameters=tuple(
      (p.name, None if p.default is p.empty else repr(p.default))
      for p in parameters
      if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ),
  )
