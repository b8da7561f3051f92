"""Process rewards: what a completion shows of how the policy works.

A detector says of a completion whether something is wrong with it. What it
finds becomes a reward of that completion, named after it; one that costs
nothing is noted all the same, so that its rate can be watched.

  malformed_call   a tool call was attempted that is none
  failing_call     a tool that was called answered with an error
  language_mixing  much of the text is in another script than most of it
  repetition       most of it repeats what it has already said
  no_structure     the text does not have the form that is asked for

All but `failing_call` need nothing but the completion, so they work for any
agent. Whether a call failed is read from the transcript, as tools in a sandbox
and environments write it; a black box has none.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
import unicodedata

import numpy as np

from forge_jax import errors, types

NAMES = (
  "malformed_call",
  "failing_call",
  "language_mixing",
  "repetition",
  "no_structure",
)
_FAILED = re.compile(
  r"\Aerror: |\[(exit status|timed out|out of memory|ended by signal)"
  r"[^\]\n]*\]\Z"
)
# Scripts that are written together are one; Greek is mathematics.
_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "GREEK": None}
_LEAST_LETTERS = 20  # in which a mixture can be seen
_GRAM = 8  # tokens that make a repeated passage
_LEAST_TOKENS = 64  # in which a repetition can be seen
_MOST_REPEATED = 0.5  # share of passages that may have occurred before


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessConfig:
  """What each finding costs its completion, before credit weighs and caps it."""

  malformed_call: float = 0.0
  failing_call: float = 0.0
  language_mixing: float = 0.0
  repetition: float = 0.0
  no_structure: float = 0.0
  # A regular expression that a whole reply must match, such as
  # "(?s)<think>.+</think>.+"; "": any reply will do.
  structure: str = ""
  most_mixed: float = 0.1  # share of letters in other scripts that is no mixing

  def __post_init__(self):
    for name in NAMES:
      if getattr(self, name) < 0:
        raise errors.ConfigError(
          f"process.{name} is {getattr(self, name)}; a cost is at least 0"
        )
    if not 0 <= self.most_mixed <= 1:
      raise errors.ConfigError(
        f"process.most_mixed is {self.most_mixed}; expected 0 to 1"
      )
    try:
      re.compile(self.structure)
    except re.error as error:
      raise errors.ConfigError(
        f"process.structure {self.structure!r} is no regular expression: "
        f"{error}"
      ) from error


class ProcessRewards:
  """Finds what is wrong with completions."""

  def __init__(
    self,
    config: ProcessConfig,
    decode: Callable[[Sequence[int]], str],
  ):
    """Takes what findings cost, and what turns token ids into text."""
    self._config = config
    self._decode = decode
    self._structure = re.compile(config.structure)

  def __call__(
    self,
    completions: Sequence[types.Completion],
    transcript: types.Messages,
  ) -> list[types.Reward]:
    """The findings of an episode.

    Args:
      completions: of the episode, in the order they were requested.
      transcript: of the agent; empty if there is none.
    """
    failed = _failed_steps(completions, transcript)
    return [
      types.Reward(
        name, types.Component.PROCESS, -getattr(self._config, name), step
      )
      for step, completion in enumerate(completions)
      for name, found in self._examine(completion, step in failed).items()
      if found
    ]

  def _examine(
    self, completion: types.Completion, failed: bool
  ) -> Mapping[str, bool]:
    text = self._decode(completion.response_ids.tolist())
    return {
      "malformed_call": completion.malformed,
      "failing_call": failed,
      "language_mixing": mixed(text) > self._config.most_mixed,
      "repetition": repeated(completion.response_ids) > _MOST_REPEATED,
      "no_structure": bool(self._config.structure)
      and self._structure.fullmatch(text.strip()) is None,
    }


def mixed(text: str) -> float:
  """Share of a text's letters in other scripts than most of them, 0..1."""
  scripts = collections.Counter(map(_script, filter(str.isalpha, text)))
  scripts.pop(None, None)
  total = scripts.total()
  if total < _LEAST_LETTERS:
    return 0.0
  return 1 - max(scripts.values()) / total


def repeated(tokens: np.ndarray) -> float:
  """Share of a response's passages that occurred in it before, 0..1.

  Args:
    tokens: int [R]; a passage is `_GRAM` of them in a row.
  """
  if len(tokens) < _LEAST_TOKENS:
    return 0.0
  passages = np.lib.stride_tricks.sliding_window_view(tokens, _GRAM)
  return 1 - len(np.unique(passages, axis=0)) / len(passages)


def _script(letter: str) -> str | None:
  """The script of a letter; None: it is at home in any."""
  script = unicodedata.name(letter, "").partition(" ")[0]
  return _SAME_SCRIPT.get(script, script)


def _failed_steps(
  completions: Sequence[types.Completion], transcript: types.Messages
) -> set[int]:
  """The completions whose calls had a failing one among them.

  Every assistant message of a transcript is a completion of the main agent that
  reached it, in the same order; but for those that open it, as examples.
  """
  sub_agent = types.RequestKind.SUB_AGENT
  steps = [
    step
    for step, completion in enumerate(completions)
    if completion.delivered
    and not (completion.request and completion.request.kind == sub_agent)
  ]
  replies = sum(message["role"] == "assistant" for message in transcript)
  # How many replies have been completions; below 1: those so far are examples.
  place = min(len(steps) - replies, 0)
  failed = set()
  for message in transcript:
    content = message.get("content")
    if message["role"] == "assistant":
      place += 1
    elif (
      message["role"] == "tool"
      and isinstance(content, str)
      and _FAILED.search(content.strip())
      and place > 0
    ):
      failed.add(steps[place - 1])
  return failed
