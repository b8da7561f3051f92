"""Records to look up, in a closed vocabulary that a small model can learn.

Every name holds another name. A question gives some names and how often to
follow what they hold; the tool `look` says what one name holds. It takes its
time, however many calls a reply makes, so that looking up several names at once
is faster; and it says more than was asked, so that a long search does not fit in
a context.

    Follow 2: kabu rulu     ->  look(kabu), look(rulu)  ->  kabu holds meli. ...
                            ->  look(meli), look(tobi)  ->  ...
                            ->  nobu sabi

Splits: train, heldout; see `splits`. Difficulty: level more hops.

Rewards:
  answer  perf +1.0  the right names, in their order
"""

import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import random
from typing import Any

from forge_jax import errors, types
from forge_jax.tasks import base, splits, tool_calls

_TOOL = base.tool("look", "Says what a name holds.", {"name": base.TEXT})
_POLICIES = ("random", "optimal", "sequential", "malformed")
_SYSTEM = "Look names up. Then reply with the names at the end."
NAMES = tuple(
  a + b + c + d
  for (a, b), (c, d) in itertools.product(
    itertools.product("kmnrst", "aeou"), itertools.product("bl", "iu")
  )
)
_FILLER = (
  "old",
  "dusty",
  "page",
  "of",
  "the",
  "great",
  "book",
  "in",
  "a",
  "dark",
)


@dataclasses.dataclass(frozen=True, slots=True)
class RecordsConfig:
  """Configures the domain; (least, most) are drawn evenly for each question."""

  starts: tuple[int, int] = (1, 3)  # names of a question
  hops: tuple[int, int] = (1, 1)  # how often they are followed
  seconds: float = 0.0  # that looking a name up takes
  padding: int = 0  # words that it says beside what was asked
  max_tokens: int = 96  # most new tokens of one assistant turn
  names: int = len(NAMES)  # that there are: few are learned sooner
  seed: int = 0  # of the train split only

  def __post_init__(self):
    for name in ("starts", "hops"):
      least, most = getattr(self, name)
      if not 1 <= least <= most:
        raise errors.ConfigError(
          f"records.{name}={least, most}; expected 1 <= least <= most"
        )
    if self.names > len(NAMES):
      raise errors.ConfigError(
        f"records.names={self.names}; there are {len(NAMES)}"
      )
    if self.starts[1] * (self.hops[1] + 1) > self.names:
      raise errors.ConfigError(
        f"records.starts={self.starts} and hops={self.hops} need more than the "
        f"{self.names} names there are"
      )


class Records:
  """The domain; see the module's docstring."""

  name = "records"

  def __init__(self, config: RecordsConfig):
    self._config = config
    self._names = NAMES[: config.names]

  @property
  def max_tokens(self) -> int:
    return self._config.max_tokens

  def at(self, level: int) -> "Records":
    """The same domain with tasks of another difficulty."""
    least, most = self._config.hops
    hops = (least + level, most + level)
    return Records(dataclasses.replace(self._config, hops=hops))

  def task(self, split: str, index: int) -> types.Task:
    """The index-th task; its payload has question and chains."""
    return splits.draw(self.name, split, index, self._config.seed, self._draw)

  def environment(self, task: types.Task) -> base.Environment:
    """A fresh environment for one episode of the task."""
    return RecordsEnvironment(self._config, task.payload)

  def script(self, task: types.Task, policy: str) -> Sequence[types.Message]:
    """What "random", "optimal", "sequential" or "malformed" replies.

    optimal: follows all names at once; sequential: one after another;
    malformed: as optimal, but its first call lacks its end, and it tries again;
    random: looks nothing up and says any names.

    Raises:
      ConfigError: it knows no such policy.
    """
    if policy not in _POLICIES:
      raise errors.ConfigError(
        f"records has no script for {policy!r}; expected one of "
        f"{', '.join(_POLICIES)}"
      )
    chains = task.payload["chains"]
    ends = {"role": "assistant", "content": " ".join(c[-1] for c in chains)}
    rounds = zip(*(chain[:-1] for chain in chains), strict=True)
    if policy == "random":
      names = random.Random(task.id).sample(self._names, len(chains))
      return [{"role": "assistant", "content": " ".join(names)}]
    if policy == "sequential":
      rounds = [[name] for chain in chains for name in chain[:-1]]
    calls = [
      tool_calls.call(*(("look", {"name": name}) for name in names))
      for names in rounds
    ]
    if policy == "malformed":
      half = json.dumps({"name": "look", "arguments": {"name": chains[0][0]}})
      broken = f"<tool_call>\n{half[:-1]}\n</tool_call>"
      calls.insert(0, {"role": "assistant", "content": broken})
    return [*calls, ends]

  def _draw(self, rng: random.Random) -> dict[str, Any]:
    count = rng.randint(*self._config.starts)
    hops = rng.randint(*self._config.hops)
    names = rng.sample(self._names, count * (hops + 1))
    chains = [names[i::count] for i in range(count)]
    starts = " ".join(chain[0] for chain in chains)
    return {"question": f"Follow {hops}: {starts}", "chains": chains}


class RecordsEnvironment:
  """One question and its records."""

  def __init__(self, config: RecordsConfig, payload: Mapping):
    self._config = config
    self._question = payload["question"]
    self._held = {
      a: b for chain in payload["chains"] for a, b in itertools.pairwise(chain)
    }
    self._truth = [chain[-1] for chain in payload["chains"]]
    self._filler = random.Random(self._question)
    self._answer: list[str] | None = None

  @property
  def tools(self) -> Sequence[types.Message]:
    return (_TOOL,)

  def reset(self) -> types.Messages:
    return [
      {"role": "system", "content": _SYSTEM},
      {"role": "user", "content": self._question},
    ]

  async def respond(self, reply: types.Message) -> types.Messages | None:
    """What the names hold; None after a reply that calls nothing."""
    if self._answer is not None:
      raise ValueError("the episode is over: it takes no further reply")
    text = reply.get("content") or ""
    if calls := reply.get("tool_calls"):
      await asyncio.sleep(self._config.seconds)
      return [
        {
          "role": "tool",
          "tool_call_id": call["id"],
          "content": self._look(call["function"]),
        }
        for call in calls
      ]
    if "<tool_call>" in text:  # it meant to call: it may try again
      return [{"role": "user", "content": "error: that is no call"}]
    self._answer = text.split()
    return None

  def rewards(self) -> Sequence[types.Reward]:
    if self._answer != self._truth:
      return ()
    return (types.Reward("answer", types.Component.PERF, 1.0),)

  def _look(self, function: Mapping) -> str:
    name = tool_calls.read(function["arguments"]).get("name")
    if function["name"] != "look" or name not in self._held:
      return "error: nothing is known of it"
    words = self._filler.choices(_FILLER, k=self._config.padding)
    return " ".join((f"{name} holds {self._held[name]}.", *words))
