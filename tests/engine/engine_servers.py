"""A server of a scripted engine, and a client of it, for the tests."""

import contextlib

from forge_jax.engine import api, scripted, server, sglang


def scripted_reply(request):
  """Counts up from the prompt's length: another prompt, another reply."""
  first = len(request.prompt_ids)
  return [first + n for n in range(200)]


def text(ids):
  return "".join(f"<{id}>" for id in ids)


@contextlib.asynccontextmanager
async def serving(engine=None, *, eos=(), config=None, **client):
  """Yields an engine, its server and a connected client."""
  engine = engine or scripted.ScriptedEngine(
    scripted_reply, max_context=256, decode=text
  )
  served = server.EngineServer(
    engine, config or server.EngineServerConfig(), eos_token_ids=eos
  )
  await served.start()
  made = sglang.SGLangEngine(sglang.SGLangConfig(url=served.url, **client))
  try:
    await made.connect()
    yield engine, served, made
  finally:
    await made.aclose()
    await served.stop()


def request(id, prompt=(1, 2, 3), **sampling):
  sampling = {"max_tokens": 5, "seed": 7} | sampling
  return api.GenerateRequest(id, tuple(prompt), api.SamplingParams(**sampling))


async def chunks(engine, asked):
  return [chunk async for chunk in engine.generate(asked)]


def joined(found, field):
  return [item for chunk in found for item in getattr(chunk, field)]
