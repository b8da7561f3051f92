"""A taskset written for `verifiers` is played in a sandbox, as it is.

verifiers lives in .verifiers, which `make test` makes: it needs other versions
than ours. The taskset is tests/agents/verifiers/reverse_words.py.
"""

import dataclasses
import json
import os
import pathlib

import pytest

from forge_jax import errors, types
from forge_jax.agents import black_box, profiles
from forge_jax.agents.sandbox import bubblewrap
from forge_jax.gateway import client, scripted
from forge_jax.rollout import evaluation
from forge_jax.tasks import verifiers

HERE = pathlib.Path(__file__).parent / "verifiers"
INSTALLED = (pathlib.Path(__file__).parents[2] / ".verifiers").resolve()
Status = types.EpisodeStatus
ENV = {"taskset": {"id": "reverse-words"}}


def domain(harness="null", **config):
  env = ENV | {"agent": {"harness": {"id": harness}}}
  return verifiers.VerifiersDomain(
    verifiers.VerifiersConfig(**{"env": env, "train": 2, "heldout": 1} | config)
  )


async def evaluate(one, split, count, replies):
  if not (INSTALLED / ".installed").exists():
    pytest.skip("there is no .verifiers: `make .verifiers/.installed` makes it")
  try:
    backend = bubblewrap.Bubblewrap(
      bubblewrap.BubblewrapConfig(
        show=(str(INSTALLED), str(HERE)), path=(f"{INSTALLED}/bin",)
      )
    )
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))
  # As if the taskset's package were installed.
  profile = dataclasses.replace(
    profiles.VERIFIERS, env={"PYTHONPATH": str(HERE)}
  )
  with scripted.serve(replies) as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    result = await evaluation.evaluate(
      [one],
      split,
      count,
      black_box.BlackBoxAgent(profile, backend),
      admin,
      model_name="policy",
      permits=1,
    )
    await admin.aclose()
  return result.episodes


async def test_a_taskset_is_played_in_our_sandbox():
  call = json.dumps({"name": "bash", "arguments": {"command": "id -un"}})
  replies = [f"<tool_call>\n{call}\n</tool_call>", "It is regal."]
  (episode,) = await evaluate(domain("bash"), "heldout", 1, replies)
  assert (episode.error, episode.status) == (None, Status.COMPLETED)
  assert {r.name: r.value for r in episode.rewards} == {
    "exact": 1.0,
    "short": 0.25,
  }
  first, second = episode.completions
  assert second.parent == first.id
  assert len(second.response_ids) == len("It is regal.") + 1


def test_tasks_go_round_and_splits_are_apart():
  one = domain()
  train = [one.task("train", n).payload["index"] for n in range(4)]
  assert train == [0, 1, 0, 1]
  assert one.task("heldout", 5).payload == {"index": 2}
  assert one.task("heldout", 5).id == "reverse-words/heldout/5"
  with pytest.raises(errors.ConfigError, match="no tasks in split 'test'"):
    one.task("test", 0)


def test_a_verdict_is_read_and_a_bad_one_is_named():
  one = domain()
  environment = one.environment(one.task("train", 1))
  assert json.loads(environment.files()["episode.json"])["index"] == 1
  assert environment.rewards() == []
  failed = {"ok": False, "errors": ["TaskError: no"], "rewards": {}}
  environment.collect({"verdict.json": json.dumps(failed).encode()})
  with pytest.raises(errors.AgentError, match="TaskError: no"):
    environment.rewards()
  environment.collect({"verdict.json": b"{"})
  with pytest.raises(ValueError, match="Expecting property name"):
    environment.rewards()


@pytest.mark.parametrize(
  ("config", "message"),
  [({"env": {}}, "a taskset with an id"), ({"train": 0}, "train is 0")],
)
def test_a_configuration_that_cannot_work(config, message):
  with pytest.raises(errors.ConfigError, match=message):
    domain(**config)
