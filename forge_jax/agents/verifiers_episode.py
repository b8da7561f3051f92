"""Plays one episode of an environment of `verifiers`, as it is, in a sandbox.

It stands alone and runs on a Python that has `verifiers` (0.4) and the taskset's
package installed, in an environment of its own:

  python verifiers_episode.py MODEL MAX_TOKENS

What it shall play is `episode.json` in its directory; what the environment said of it goes to
`verdict.json`: its named rewards (weighted), metrics, errors, and whether it is
`ok`. The model is the one behind OPENAI_BASE_URL.
"""

import asyncio
import json
import os
import pathlib
import sys


async def play(spec: dict, model: str, max_tokens: int) -> dict:
  """Plays an episode; returns the verdict.

  Args:
    spec: `config` of the environment, as in verifiers' [env] block, and the
      task's `index`.
    model: its name.
    max_tokens: most new tokens of one completion.
  """
  import verifiers.v1 as vf
  from verifiers.v1.utils import loaders

  _use_own_python()
  env = loaders.load_environment(
    loaders.resolve_env_config(_in_subprocesses(spec["config"]))
  )
  index = spec["index"]
  (task,) = env.taskset.include(idx=[f"{index}:{index + 1}"])
  context = vf.ModelContext(
    model=model,
    client=vf.EvalClientConfig(
      base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY"
    ),
    sampling=vf.SamplingConfig(max_tokens=max_tokens),
  )
  async with env.serving():
    episode = await env.run_slot(env.slots(task)[0], context)
  errors = [*episode.errors, *(e for t in episode.traces for e in t.errors)]
  return {
    "ok": episode.ok,
    "errors": [f"{error.type}: {error.message}" for error in errors],
    "rewards": _named(episode, "rewards", lambda reward: reward.value),
    "metrics": _named(episode, "metrics", float),
  }


def _in_subprocesses(config: dict) -> dict:
  """The sandbox is around everything: no role needs a machine of its own."""
  agent = {"runtime": {"type": "subprocess"}} | config.get("agent", {})
  return config | {"agent": agent}


def _use_own_python() -> None:
  """Programs of harnesses run on this Python, which has what they import.

  verifiers would have `uv` download it, and in a sandbox there is no network.
  """
  from verifiers.v1 import runtimes

  async def prepare(self, script, env=None, *, activate=True):
    del env, activate
    name = f"program-{abs(hash(script))}.py"
    data = script.encode() if isinstance(script, str) else script
    await self.write(name, data)
    return [sys.executable, str(self.workdir / name)]

  runtimes.SubprocessRuntime.prepare_uv_script = prepare


def _named(episode, kind: str, value) -> dict[str, float]:
  """By name, summed over the traces of the episode's agents."""
  found: dict[str, float] = {}
  for trace in episode.traces:
    for name, one in getattr(trace, kind).items():
      if one is not None:
        found[name] = found.get(name, 0.0) + value(one)
  return found


if __name__ == "__main__":
  episode_spec = json.loads(pathlib.Path("episode.json").read_text())
  verdict = asyncio.run(play(episode_spec, sys.argv[1], int(sys.argv[2])))
  pathlib.Path("verdict.json").write_text(json.dumps(verdict))
