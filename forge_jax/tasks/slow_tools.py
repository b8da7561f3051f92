"""Tool use: compare facts that slow tools know; several may be asked at once.

A question names some places and asks which of them has the most of something.
One call looks one place up and takes its time; calls of one reply are answered
together, in the time of the slowest. All ways that look everything up are
right; the quick ones ask in parallel, which is what a speed reward pays for.

Splits: train, heldout; see `splits`. Difficulty: 2 + level places.

Rewards:
  answer     perf +1.0     the right place, after it was looked up
  no_answer  process -0.1  the last reply has no <answer>...</answer>
"""

import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import random
from typing import Any

from forge_jax import errors, types
from forge_jax.tasks import answers, base, splits, tool_calls

_START = ("Al", "Bel", "Cor", "Dun", "Es", "Fal", "Gar", "Hol", "Ir", "Kel")
_END = ("burg", "dale", "ford", "holm", "mouth", "stad", "ton", "ville")
_FIELDS = ("inhabitants", "bridges", "schools", "trees")
_HIGHEST = 10
_TOOL = base.tool(
  "look_up",
  "Looks a fact about a place up. It is slow: what does not depend on another "
  "result is best asked at once.",
  {
    "place": {**base.TEXT, "description": "The place's name."},
    "field": {**base.TEXT, "enum": list(_FIELDS)},
  },
)


@dataclasses.dataclass(frozen=True, slots=True)
class SlowToolsConfig:
  """How many places, and how slow."""

  level: int = 0
  seconds: float = 0.5  # that a call takes on average
  seed: int = 0  # of the train split only
  max_tokens: int = 256  # most new tokens of one completion

  def __post_init__(self):
    if not 0 <= self.level <= _HIGHEST or self.seconds < 0:
      raise errors.ConfigError(
        f"slow_tools level is {self.level} and seconds {self.seconds}; "
        f"expected 0 to {_HIGHEST}, and at least 0"
      )


class SlowTools:
  """The domain; see the module's docstring."""

  name = "slow_tools"

  def __init__(self, config: SlowToolsConfig):
    self._config = config
    self.max_tokens = config.max_tokens

  def at(self, level: int) -> "SlowTools":
    """The same domain with tasks of another difficulty."""
    return SlowTools(dataclasses.replace(self._config, level=level))

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; its payload has question, answer and facts."""
    make = functools.partial(_make, 2 + self._config.level)
    return splits.draw(self.name, split, index, self._config.seed, make)

  def environment(self, task: types.Task) -> "SlowToolsEnvironment":
    """A fresh environment for one episode of the task."""
    return SlowToolsEnvironment(task.payload, self._config.seconds)

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What the policy "random", "sequential" or "optimal" replies.

    sequential: right, with one call in each reply; random: looks one place up
    and names any.
    """
    facts, field = task.payload["facts"], task.payload["field"]
    calls = [("look_up", {"place": p, "field": field}) for p in facts]
    answer = task.payload["answer"]
    if policy == "random":
      answer = random.Random(task.id).choice(list(facts))
      calls = calls[:1]
    if policy == "optimal":
      return [tool_calls.call(*calls), answers.reply(answer)]
    return [*(tool_calls.call(one) for one in calls), answers.reply(answer)]


class SlowToolsEnvironment:
  """One question and the tool that knows the facts."""

  tools = (_TOOL,)

  def __init__(self, payload: Mapping[str, Any], seconds: float):
    self._payload = payload
    self._seconds = seconds
    self._seen: set[str] = set()
    self._answer: str | None = None

  def reset(self) -> types.Messages:
    """The question."""
    content = f"{self._payload['question']} {answers.FORM}"
    return [{"role": "user", "content": content}]

  async def respond(self, reply: types.Message) -> types.Messages | None:
    """The results of all calls, together; None: there is none, it is over."""
    calls = reply.get("tool_calls") or []
    if not calls:
      self._answer = answers.find(reply.get("content") or "")
      return None
    results = await asyncio.gather(
      *(self._look_up(call["function"]) for call in calls)
    )
    return [
      {"role": "tool", "tool_call_id": call["id"], "content": result}
      for call, result in zip(calls, results, strict=True)
    ]

  def rewards(self) -> Sequence[types.Reward]:
    """What the answer is worth."""
    if self._answer is None:
      return [types.Reward("no_answer", types.Component.PROCESS, -0.1)]
    right = self._answer == self._payload["answer"]
    if not right or self._answer not in self._seen:
      return []
    return [types.Reward("answer", types.Component.PERF, 1.0)]

  async def _look_up(self, function: Mapping[str, Any]) -> str:
    arguments = tool_calls.read(function["arguments"])
    place, field = arguments.get("place"), arguments.get("field")
    if function["name"] != "look_up" or field != self._payload["field"]:
      return f"error: {function['name']} knows nothing of {field!r}"
    if not isinstance(place, str) or place not in self._payload["facts"]:
      return f"error: there is no place {place!r}"
    # As slow in every episode of the task, so that speeds can be compared.
    draw = random.Random(f"{place} {self._payload['question']}")
    await asyncio.sleep(self._seconds * draw.uniform(0.5, 1.5))
    self._seen.add(place)
    return str(self._payload["facts"][place])


def _make(count: int, rng: random.Random) -> dict[str, Any]:
  """Draws a question about so many places."""
  names = [start + end for start in _START for end in _END]
  places = rng.sample(names, count)
  values = rng.sample(range(10, 10_000), count)
  facts = dict(zip(places, values, strict=True))
  field = rng.choice(_FIELDS)
  listed = f"{', '.join(places[:-1])} and {places[-1]}"
  return {
    "question": f"Which of {listed} has the most {field}?",
    "answer": max(facts, key=facts.__getitem__),
    "facts": facts,
    "field": field,
  }
