"""How many requests does the gateway serve, and how long do they take there?

The engine is a script that replies at once, so that all time is the gateway's.
The gateway is one process, the load generator another; both share the cores.
Records are durable: every completion is on the disk before its reply is sent
(`--journal` says where). Agents play whole episodes, each in a session of its
own: they open it, ask turn by turn with the whole conversation, and close it;
only completions count. Messages of a request have 2 kB (8 turns, 1.1 to 2.9 kB)
or 100 kB (40 turns, 20 to 180 kB) on average.

  rates    requests/s with 16 agents that ask again as soon as they are answered
  latency  100 requests/s, 2 kB: from sending a request to its whole reply
  litellm  LiteLLM's proxy and the gateway, each in front of the same scripted
           upstream, a process of its own: the proxy without a database, with one
           worker and with two, of which the faster counts
  held     1,000 sessions open for ten minutes, each asking every ten seconds

LiteLLM, version 1.108.7, lives in an environment of its own:
  python -m venv ENV && ENV/bin/pip install 'litellm[proxy]==1.108.7'

Command: python -m experiments.benchmarks.gateway --quick         (under 50 s)
         python -m experiments.benchmarks.gateway --parts=rates,latency
         python -m experiments.benchmarks.gateway --parts=litellm --litellm=ENV
         python -m experiments.benchmarks.gateway --parts=held  (eleven minutes)

Prints a line per measurement, with the share of a core that gateway and load
generator took, and one JSON line; what was not measured is null there.
"""

import asyncio
from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from experiments.benchmarks import gateway_load as load

_QUICK = flags.DEFINE_bool("quick", False, "Measure for less time, fewer.")
_PARTS = flags.DEFINE_list("parts", ["rates", "latency"], "What to measure.")
_LITELLM = flags.DEFINE_string("litellm", None, "LiteLLM's environment.")
_JOURNAL = flags.DEFINE_string(
  "journal", None, "Folder of the records; empty: they are not kept."
)
_AGENTS = 16
_RATE = 100  # requests/s, of `latency` and of `held`
_TICK = os.sysconf("SC_CLK_TCK")


class Process:
  """A server, and what it takes."""

  def __init__(self, process: subprocess.Popen, url: str, token: str = ""):
    self.url, self.token = url, token
    self._process = process

  def cpu(self) -> float:
    """Seconds of CPU so far, children included."""
    return sum(self._cpu(pid) for pid in self._family())

  def memory(self) -> float:
    """Resident megabytes."""
    status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000

  def _family(self) -> list[int]:
    pids = [self._process.pid]
    for pid in pids:
      with contextlib.suppress(OSError):
        for tasks in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
          pids += map(int, tasks.read_text().split())
    return pids

  @staticmethod
  def _cpu(pid: int) -> float:
    try:
      stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
      return 0.0
    times = stat.rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / _TICK


@contextlib.contextmanager
def serving(role: str, **settings: str | None) -> Iterator[Process]:
  """A process of gateway_serve."""
  command = [sys.executable, "-m", "experiments.benchmarks.gateway_serve", role]
  command += [f"--{k}={v}" for k, v in settings.items() if v]
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:
    try:
      yield Process(process, **json.loads(process.stdout.readline()))
    finally:
      process.stdin.close()
      process.wait(30)


@contextlib.contextmanager
def gateway(upstream: str | None = None) -> Iterator[Process]:
  """A gateway whose records are durable."""
  with tempfile.TemporaryDirectory(prefix="gateway_") as folder:
    kept = folder if _JOURNAL.value is None else _JOURNAL.value
    with serving("gateway", journal=kept, upstream=upstream) as process:
      yield process


@contextlib.contextmanager
def litellm(upstream: str, workers: int) -> Iterator[Process]:
  """LiteLLM's proxy in front of an upstream."""
  config = {
    "model_list": [
      {
        "model_name": "policy",
        "litellm_params": {
          "model": "openai/policy",
          "api_base": f"{upstream}/v1",
          "api_key": "none",
        },
      }
    ],
    "litellm_settings": {"telemetry": False},
  }
  port = 23_000 + os.getpid() % 10_000
  key = f"sk-{secrets.token_hex(16)}"  # it does not start without one
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "config.yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    command = [f"{_LITELLM.value}/bin/litellm", "--config", str(path)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", str(workers)]
    environment = os.environ | {
      "LITELLM_LOG": "ERROR",
      "LITELLM_MASTER_KEY": key,
      "NO_PROXY": "*",
    }
    with (
      open(pathlib.Path(folder, "log"), "w") as log,
      subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, cwd=folder
      ) as process,
    ):
      try:
        yield Process(process, f"http://127.0.0.1:{port}", key)
      finally:
        process.terminate()
        process.wait(30)


async def rate(workload: load.Workload, served: Process) -> float:
  """Requests/s of agents that never wait; prints what it took."""
  seconds = 6 if _QUICK.value else 20
  tally = load.Tally()
  with measured(workload.name, served, tally):
    return await load.play_sessions(
      served.url, served.token, workload, _AGENTS, seconds, tally
    )


@contextlib.contextmanager
def measured(what: str, served: Process, tally: load.Tally) -> Iterator[None]:
  """Prints a line on what happens in a block."""
  cpu, own, began = served.cpu(), time.process_time(), time.perf_counter()
  yield
  took = time.perf_counter() - began
  lost = f", {tally.lost} lost" if tally.lost else ""
  linked = f", {tally.unlinked} not linked" if tally.unlinked else ""
  print(
    f"{what}: {tally.served / took:.0f} requests/s, "
    f"p50 {tally.percentile(50):.1f} ms, p99 {tally.percentile(99):.1f} ms; "
    f"server {(served.cpu() - cpu) / took:.0%} of a core, "
    f"load {(time.process_time() - own) / took:.0%}, "
    f"{served.memory():.0f} MB; {tally.errors} errors{lost}{linked}"
  )
  for problem in sorted(tally.problems)[:3]:
    print("  ", problem)
  sys.stdout.flush()


async def latency(served: Process) -> load.Tally:
  """Requests at a steady rate."""
  seconds = 6 if _QUICK.value else 30
  sessions = -(-_RATE * seconds // load.SMALL.turns)
  tally = load.Tally()
  async with load.opened(
    served.url, served.token, load.SMALL, sessions, tally
  ) as opened:
    with measured(f"{_RATE}/s, 2 kB", served, tally):
      await load.paced(opened, _RATE, seconds)
  return tally


async def beside() -> tuple[float, float]:
  """Requests/s of LiteLLM's proxy and of the gateway, on one upstream."""
  seconds = 15
  rates = []
  with serving("upstream") as upstream:
    for workers in (1, 2):
      with litellm(upstream.url, workers) as proxy:
        await load.ready(proxy.url + "/health/liveliness", 120)
        warm = load.Tally()
        await load.play_conversations(
          proxy.url, proxy.token, load.SMALL, _AGENTS, 3, warm
        )
        tally = load.Tally()
        with measured(f"LiteLLM, {workers} workers, 2 kB", proxy, tally):
          await load.play_conversations(
            proxy.url, proxy.token, load.SMALL, _AGENTS, seconds, tally
          )
        rates.append(tally.served / seconds)
    with gateway(upstream.url) as served:
      tally = load.Tally()
      with measured("the gateway on that upstream, 2 kB", served, tally):
        ours = await load.play_sessions(
          served.url, served.token, load.SMALL, _AGENTS, seconds, tally
        )
  return max(rates), ours


async def held(served: Process) -> load.Tally:
  """Many sessions open at the same time, each asking now and then."""
  count, seconds = (200, 6) if _QUICK.value else (1000, 600)
  tally = load.Tally()
  async with load.opened(
    served.url, served.token, load.SMALL, count, tally
  ) as opened:
    with measured(f"{count} sessions, {seconds} s", served, tally):
      watch = asyncio.create_task(_watch(served))
      await load.paced(opened, _RATE, seconds)
      watch.cancel()
  print(f"   after closing: {tally.lost} of {tally.served} turns lost")
  return tally


async def _watch(served: Process) -> None:
  while True:
    await asyncio.sleep(60)
    print(f"   {served.memory():.0f} MB", flush=True)


async def measure() -> dict[str, float | None]:
  """All parts asked for; the figures of the last line."""
  names = "rps_2kb rps_100kb added_ms_p50 added_ms_p99 litellm_rps_2kb"
  figures: dict[str, float | None] = dict.fromkeys(names.split())
  figures |= {"sessions_held": None, "lost_turns": None}
  parts = {"rates", "latency", "held"} if _QUICK.value else set(_PARTS.value)
  if parts & {"rates", "latency"}:
    with gateway() as served:
      if "rates" in parts:
        await rate(load.SMALL, served)  # warms up
        figures["rps_2kb"] = await rate(load.SMALL, served)
        figures["rps_100kb"] = await rate(load.LARGE, served)
      if "latency" in parts:
        tally = await latency(served)
        figures["added_ms_p50"] = tally.percentile(50)
        figures["added_ms_p99"] = tally.percentile(99)
  if "litellm" in parts:
    figures["litellm_rps_2kb"], ours = await beside()
    times = ours / figures["litellm_rps_2kb"]
    print(f"the gateway serves {times:.1f} times LiteLLM's rate")
  if "held" in parts:
    with gateway() as served:
      tally = await held(served)
      figures["sessions_held"] = tally.held
      figures["lost_turns"] = tally.lost
  return {k: None if v is None else round(v, 2) for k, v in figures.items()}


def main(_: list[str]) -> None:
  """Measures and prints."""
  print(json.dumps(asyncio.run(measure())))


if __name__ == "__main__":
  app.run(main)
