"""What acts, asks and captures imports and serves where JAX is not installed."""

import asyncio
import os
import pathlib
import signal
import sys

import openai

from forge_jax.engine import scripted, server
from forge_jax.gateway import client as gateway_client

ROOT = pathlib.Path(__file__).parents[2]
BLOCK = """
import sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax"):
      raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""
IMPORTS = """
import importlib, pkgutil
names = ["forge_jax.engine." + n for n in ("api", "scripted", "server", "sglang")]
for package in ("tasks", "agents", "gateway"):
  root = importlib.import_module(f"forge_jax.{package}")
  prefix = root.__name__ + "."
  names += [m.name for m in pkgutil.walk_packages(root.__path__, prefix)]
for name in names:
  importlib.import_module(name)
print(len(names), "jax" in sys.modules)
"""
SERVE = """
import runpy
runpy.run_module("launch.gateway", run_name="__main__", alter_sys=True)
"""


async def python(program, *arguments):
  """A Python without JAX that runs a program; its output is one stream."""
  return await asyncio.create_subprocess_exec(
    *(sys.executable, "-c", BLOCK + program, *arguments),
    stdout=asyncio.subprocess.PIPE,
    stderr=asyncio.subprocess.STDOUT,
    cwd=ROOT,
    env=os.environ | {"FORGE_ADMIN_TOKEN": "admin"},
  )


async def test_agents_gateway_and_tasks_import_without_jax():
  process = await python(IMPORTS)
  said, _ = await process.communicate()
  assert process.returncode == 0, said
  *_, count, found = said.decode().split()
  assert int(count) >= 15
  assert found == "False"


async def test_the_gateway_serves_without_jax(smollm2):
  reply = [*smollm2.encode("Hello there."), smollm2.eos_token_id]
  engine = scripted.ScriptedEngine(lambda request: reply)
  served = server.EngineServer(engine)
  await served.start()
  process = await python(
    SERVE,
    "--config=experiments/serve_gateway.py",
    f"--config.upstream.urls=('{served.url}',)",
    "--config.gateway.port=0",
  )
  try:
    line = ""
    while "listens on" not in line:
      line = (await process.stdout.readline()).decode()
      assert line, "the gateway ended"
    admin = gateway_client.GatewayClient(line.split()[-1], "admin")
    keys = await admin.open_session("s", seed=3)
    async with openai.AsyncOpenAI(
      base_url=keys.base_url, api_key=keys.api_key
    ) as client:
      message = {"role": "user", "content": "Hi."}
      said = await client.chat.completions.create(
        model="policy", messages=[message]
      )
    assert said.choices[0].message.content == "Hello there."
    [completion], _ = await admin.close_session("s")
    assert completion.response_ids.tolist() == reply
    assert completion.versions.tolist() == [0] * len(reply)
    await admin.aclose()
  finally:
    process.send_signal(signal.SIGTERM)
    rest = await process.stdout.read()
    assert await process.wait() == 0, rest
    await served.stop()
