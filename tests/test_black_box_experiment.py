"""The black-box experiment's agent, against a gateway that plays a script."""

import contextlib
import os

import pytest

from experiments import black_box_calculator
from forge_jax import errors, types
from forge_jax.gateway import client, scripted
from forge_jax.rollout import episode as episode_lib
from launch import rollout_side


async def play(replies, question, truth):
  """An episode, and the prompts of its requests."""
  values = black_box_calculator.get_config().to_dict()
  side = rollout_side.RolloutSide(values)
  task = types.Task("p/train/0", "p", 0, {"question": question, "truth": truth})
  domain = black_box_calculator.PrintedAnswers(
    black_box_calculator.PrintedAnswersConfig()
  )
  with scripted.serve(replies) as gateway:
    async with contextlib.AsyncExitStack() as closing:
      try:
        agent = black_box_calculator.make_agent(side, closing)
      except errors.SandboxError as error:
        if "REQUIRE_SANDBOX" in os.environ:
          raise
        pytest.skip(str(error))
      admin = client.GatewayClient(gateway.url, gateway.admin_token)
      closing.push_async_callback(admin.aclose)
      runner = episode_lib.EpisodeRunner(
        agent,
        admin,
        model_name="policy",
        permits=1,
        deadline_seconds=60.0,
        temperature=1.0,
      )
      attempt = episode_lib.Attempt("e", task, 0, 1, 32)
      episode = await runner.run(attempt, domain.environment)
    decode = gateway.tokenizer.decode
    return episode, [decode(list(r.prompt_ids)) for r in gateway.requests]


async def test_a_compacted_history_and_a_reward_over_http():
  question = "Tom has 41 boxes with 12 pens in each box. How many pens?"
  replies = ["CALC(41 * 12)", "ANSWER(492)"]
  episode, (first, second) = await play(replies, question, 492)
  assert (episode.error, episode.perf) == (None, 1.0)
  assert [r.name for r in episode.rewards] == ["answer"]
  assert [c.parent for c in episode.completions] == [None, None]
  assert question in first and "Notes: CALC(41" not in first
  assert f"{question}\nNotes: CALC(41 * 12) = 492" in second


@pytest.mark.parametrize("replies", [["CALC(1 + 1)", "ANSWER(2)"], ["Hm."]])
async def test_what_is_wrong_or_not_printed_earns_nothing(replies):
  episode, _ = await play(replies, "What is 2 * 3?", 6)
  assert (episode.error, episode.perf) == (None, 0.0)
  assert len(episode.rewards) == 1
  assert len(episode.completions) == len(replies)
