"""Terminal: files to count in, change, sort and rename, with a shell.

Every task has one right outcome, a set of files, which is compared after the
episode. Nothing that an agent wrote is run for that.

Splits: train, heldout; see `splits`. Difficulty: there are 3 + 3 * level files.

Rewards:
  done     perf +1.0     all files are as they should be, but for white space at
                         their ends
  damaged  process -0.2  a file that was to stay is gone or has changed
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import random
from typing import Any

from forge_jax import errors, types
from forge_jax.tasks import splits, tool_calls

_WORDS = (
  "amber",
  "birch",
  "cedar",
  "delta",
  "ember",
  "fjord",
  "grove",
  "heron",
)
_NAMES = ("north", "south", "east", "west", "spring", "summer", "autumn")
_NAMES += ("winter", "dawn", "noon", "dusk", "night", "first", "second", "last")
_HIGHEST = (len(_NAMES) - 3) // 3


@dataclasses.dataclass(frozen=True, slots=True)
class TerminalConfig:
  """How much there is to work on."""

  level: int = 0
  seed: int = 0  # of the train split only
  max_tokens: int = 256  # most new tokens of one completion

  def __post_init__(self):
    if not 0 <= self.level <= _HIGHEST:
      raise errors.ConfigError(
        f"terminal level is {self.level}; expected 0 to {_HIGHEST}"
      )


class Terminal:
  """The domain; see the module's docstring."""

  name = "terminal"

  def __init__(self, config: TerminalConfig):
    self._config = config
    self.max_tokens = config.max_tokens

  def at(self, level: int) -> "Terminal":
    """The same domain with tasks of another difficulty."""
    return Terminal(dataclasses.replace(self._config, level=level))

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; its payload is that of `_Work`."""
    make = functools.partial(_make, 3 + 3 * self._config.level)
    return splits.draw(self.name, split, index, self._config.seed, make)

  def environment(self, task: types.Task) -> "TerminalEnvironment":
    """A fresh environment for one episode of the task."""
    return TerminalEnvironment(task.payload)

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What the policy "random" or "optimal" replies.

    random: a command that would be right for another task.
    """
    command = task.payload["command"]
    if policy == "random":
      rng = random.Random(task.id)
      command = _make(3, rng)["command"]
    return [
      tool_calls.call(("bash", {"command": command})),
      {"role": "assistant", "content": "Done."},
    ]


class TerminalEnvironment:
  """Files, and how they should be in the end."""

  tools = ()
  toolset = ("bash",)

  def __init__(self, payload: Mapping[str, Any]):
    self._payload = payload
    self._left: Mapping[str, bytes] | None = None

  def reset(self) -> types.Messages:
    """What there is to do."""
    return [{"role": "user", "content": self._payload["task"]}]

  def respond(self, reply: types.Message) -> None:
    """There is nothing to say: the work is in files."""

  def files(self) -> Mapping[str, bytes]:
    """What there is to work on."""
    return {p: text.encode() for p, text in self._payload["files"].items()}

  def collect(self, files: Mapping[str, bytes]) -> None:
    """Takes the files as they are now."""
    self._left = files

  def rewards(self) -> Sequence[types.Reward]:
    """Compares what is there with what should be."""
    if self._left is None:
      return []
    wanted, files = self._payload["wanted"], self._payload["files"]
    left = {p: data.rstrip() for p, data in self._left.items()}
    if left == {p: text.encode().rstrip() for p, text in wanted.items()}:
      return [types.Reward("done", types.Component.PERF, 1.0)]
    for path in wanted.keys() & files.keys():
      kept = wanted[path] == files[path]
      if kept and left.get(path) != files[path].encode().rstrip():
        return [types.Reward("damaged", types.Component.PROCESS, -0.2)]
    return []


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
  """One kind of work on given files."""

  task: str  # what is asked
  files: dict[str, str]  # before, by path
  wanted: dict[str, str]  # after
  command: str  # one that does it


def _make(count: int, rng: random.Random) -> dict[str, Any]:
  """Draws a payload: a `_Work`, and all of it that tells tasks apart."""
  work = rng.choice(_KINDS)(rng, rng.sample(_NAMES, count))
  return {
    "question": f"{work.task}\n{sorted(work.files.items())}",
    **dataclasses.asdict(work),
  }


def _lines(rng: random.Random) -> list[str]:
  return [
    " ".join(rng.choices(_WORDS, k=3)) for _ in range(rng.randrange(3, 9))
  ]


def _count(rng: random.Random, names: Sequence[str]) -> _Work:
  word = rng.choice(_WORDS)
  files = {f"{name}.log": _lines(rng) for name in names}
  count = sum(word in line.split() for f in files.values() for line in f)
  return _answered(
    f"How many lines of all .log files together contain the word {word}?",
    _text(files),
    f"cat *.log | grep -cw {word}",
    str(count),
  )


def _longest(rng: random.Random, names: Sequence[str]) -> _Work:
  sizes = rng.sample(range(2, 40), len(names))
  files = {
    f"{name}.txt": rng.choices(_WORDS, k=size)
    for name, size in zip(names, sizes, strict=True)
  }
  longest = max(files, key=lambda path: len(files[path]))
  return _answered(
    "Which .txt file has the most lines? Give its name.",
    _text(files),
    "wc -l *.txt | grep -v total | sort -n | tail -n 1 | awk '{print $2}'",
    longest,
  )


def _total(rng: random.Random, names: Sequence[str]) -> _Work:
  cities = rng.sample(_WORDS, 3)
  rows = [
    (rng.choice(names), rng.choice(cities), rng.randrange(1, 100))
    for _ in range(4 * len(names))
  ]
  city = rng.choice(cities)
  lines = ["shop,city,sold", *(f"{s},{c},{n}" for s, c, n in rows)]
  return _answered(
    f"sales.csv has the columns shop, city, sold. How much was sold in {city} "
    "in all?",
    _text({"sales.csv": lines}),
    f"awk -F, '$2 == \"{city}\" {{s += $3}} END {{print s + 0}}' sales.csv",
    str(sum(n for _, c, n in rows if c == city)),
  )


def _rename(rng: random.Random, names: Sequence[str]) -> _Work:
  old, new = rng.sample(("txt", "md", "rst", "text"), 2)
  files = _text({f"{name}.{old}": _lines(rng) for name in names})
  return _Work(
    f"Rename every .{old} file so that it ends in .{new} instead.",
    files,
    {path.removesuffix(old) + new: text for path, text in files.items()},
    f'for f in *.{old}; do mv "$f" "${{f%.{old}}}.{new}"; done',
  )


def _replace(rng: random.Random, names: Sequence[str]) -> _Work:
  old, new = rng.sample(_WORDS, 2)
  files = _text({f"{name}.conf": _lines(rng) for name in names})
  return _Work(
    f"In all .conf files, replace {old} by {new} wherever it occurs.",
    files,
    {path: text.replace(old, new) for path, text in files.items()},
    f"sed -i 's/{old}/{new}/g' *.conf",
  )


def _merge(rng: random.Random, names: Sequence[str]) -> _Work:
  files = {f"{name}.list": _lines(rng) for name in names}
  merged = sorted({line for lines in files.values() for line in lines})
  return _Work(
    "Write all different lines of the .list files to merged.txt, sorted, each "
    "once. Leave the .list files as they are.",
    _text(files),
    _text(files | {"merged.txt": merged}),
    "LC_ALL=C sort -u *.list > merged.txt",
  )


_KINDS: tuple[Callable[[random.Random, Sequence[str]], _Work], ...] = (
  _count,
  _longest,
  _total,
  _rename,
  _replace,
  _merge,
)


def _answered(
  question: str, files: dict[str, str], command: str, answer: str
) -> _Work:
  """Work whose outcome is one more file with an answer."""
  return _Work(
    f"{question} Write the answer, and nothing else, to answer.txt.",
    files,
    files | {"answer.txt": answer},
    f"{command} > answer.txt",
  )


def _text(files: Mapping[str, Sequence[str]]) -> dict[str, str]:
  return {path: "\n".join(lines) + "\n" for path, lines in files.items()}
