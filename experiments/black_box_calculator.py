"""Does an agent improve that the trainer knows nothing of, but its requests?

Question: a program with a loop, a calculator and a compaction of its own
(`programs/calculator.py`) runs as a process in a sandbox, with nothing but the
gateway's address and a key. What it prints is judged here, and the reward is
posted to its session over HTTP; the run itself scores nothing. Does CISPO on
what the gateway recorded teach SmolLM2-135M to answer held-out word problems
through that program?

Command:   python -m launch.train --config=experiments/black_box_calculator.py
Other seed: --config.seed=1 --workdir=runs/seed1
Hardware:  two CPU cores, 8 GB.
Result:    greedy success on 60 held-out questions, seeds 0, 1: 38.3% ->
           98.3%, 38.3% -> 85.0% at step 10, where seed 1 gets one template
           wrong that it had right at step 5; sampled training episodes
           4.7% -> 98.4%, 3.1% -> 81.2%
           (docs/results/black_box_calculator.md).
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import pathlib
from typing import Any

import httpx
import ml_collections

from experiments import word_problems_smollm2
from forge_jax import types
from forge_jax.agents import base, black_box, profiles
from forge_jax.tasks import word_problems

_PROGRAM = pathlib.Path(__file__).parent / "programs" / "calculator.py"
_PROFILE = profiles.Profile(
  "calculator",
  ("python3", "{home}/calculator.py", "{prompt}", "{model}", "{max_tokens}"),
  files={"~/calculator.py": _PROGRAM.read_text("utf-8")},
)


@dataclasses.dataclass(frozen=True)
class PrintedAnswersConfig:
  """As of the domain whose questions are asked."""

  seed: int = 0
  max_tokens: int = 16


class PrintedAnswers:
  """Word problems of which only the number that is printed counts."""

  name = "printed_answers"

  def __init__(self, config: PrintedAnswersConfig):
    self.max_tokens = config.max_tokens
    self._questions = word_problems.WordProblems(
      word_problems.WordProblemsConfig(seed=config.seed)
    )

  def task(self, split: str, index: int) -> types.Task:
    """The index-th question of a split of `word_problems`."""
    asked = self._questions.task(split, index)
    identity = f"{self.name}/{split}/{index}"
    return dataclasses.replace(asked, id=identity, domain=self.name)

  def environment(self, task: types.Task) -> "PrintedAnswer":
    """A fresh environment for one episode of the task."""
    return PrintedAnswer(task.payload["question"], task.payload["truth"])


class PrintedAnswer:
  """Asks, and keeps what is printed; it gives no reward itself."""

  tools = ()

  def __init__(self, question: str, truth: int):
    self._question = question
    self._truth = str(truth)
    self.is_right = False

  def reset(self) -> types.Messages:
    """The question alone: the rest of the prompt is the program's."""
    return [{"role": "user", "content": self._question}]

  def respond(self, reply: types.Message) -> None:
    """Takes what the program printed."""
    self.is_right = reply["content"] == self._truth

  def rewards(self) -> Sequence[types.Reward]:
    """None: they are posted."""
    return ()


class PostingAgent:
  """Runs the program, judges what it printed, and posts the reward."""

  def __init__(self, program: black_box.BlackBoxAgent, http: httpx.AsyncClient):
    self._program = program
    self._http = http

  async def run(
    self, environment: PrintedAnswer, endpoint: base.Endpoint
  ) -> types.Messages:
    """Plays one episode; raises httpx.HTTPError if the reward is refused."""
    messages = await self._program.run(environment, endpoint)
    reward = {
      "name": "answer",
      "component": "perf",
      "value": float(environment.is_right),
    }
    response = await self._http.post(
      endpoint.reward_url,
      json={"rewards": [reward]},
      headers={"Authorization": f"Bearer {endpoint.control_key}"},
    )
    response.raise_for_status()
    return messages


def make_agent(side: Any, closing: contextlib.AsyncExitStack) -> PostingAgent:
  """The agent of a run; `side` is its `launch.rollout_side.RolloutSide`."""
  http = httpx.AsyncClient(trust_env=False, timeout=60.0)
  closing.push_async_callback(http.aclose)
  program = black_box.BlackBoxAgent(_PROFILE, side.lineup.sandboxes(closing))
  return PostingAgent(program, http)


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = word_problems_smollm2.get_config().unlock()
  config.name = "black_box_calculator"
  config.question = __doc__.partition("\n")[0]
  config.steps = 10
  config.domains = ml_collections.ConfigDict(
    {
      "printed_answers": {
        "place": f"{__name__}:PrintedAnswers",
        "max_tokens": 16,
        "weight": 1.0,
      }
    }
  )
  config.agent.place = f"{__name__}:make_agent"
  # Eight groups an update, as there: every template has its part in each.
  config.trainer.groups_per_step = 8
  config.trainer.minibatches = 1
  config.rollout.in_flight = 16
  config.eval.heldout = 60
  config.eval.phrasings = 0
  config.eval.every = 5
  config.eval.during = 30
  config.checkpoint.every = 0
  return config.lock()
