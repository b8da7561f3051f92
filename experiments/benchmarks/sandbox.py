"""How long a sandbox takes to open, to run a first command, and to close.

Question: does an episode wait for its sandbox? The target is under 100 ms.

Command:   python -m experiments.benchmarks.sandbox
Result:    see docs/how-to/sandbox.md
"""

import argparse
import asyncio
import statistics
import time

from forge_jax.agents.sandbox import base, bubblewrap, ready


async def _times(
  backend: base.Backend, pause: float, count: int
) -> dict[str, list[float]]:
  """Milliseconds of each step, of each sandbox."""
  found: dict[str, list[float]] = {"open": [], "first command": [], "close": []}
  for _ in range(count):
    marks = [time.perf_counter()]
    box = await backend.open(base.Limits())
    marks.append(time.perf_counter())
    await box.run(["true"], seconds=10)
    marks.append(time.perf_counter())
    await box.aclose()
    marks.append(time.perf_counter())
    for place, name in enumerate(found):
      found[name].append(1e3 * (marks[place + 1] - marks[place]))
    await asyncio.sleep(pause)
  return found


async def _measure(count: int) -> None:
  bare = bubblewrap.Bubblewrap()
  watched = bubblewrap.Bubblewrap(
    bubblewrap.BubblewrapConfig(use_cgroups=False)
  )
  async with ready.Ready(bare, count=1) as ahead:
    arms = {
      "control groups": (bare, 0.0),
      "without": (watched, 0.0),
      "opened ahead": (ahead, 0.2),
    }
    for name, (backend, pause) in arms.items():
      for step, times in (await _times(backend, pause, count)).items():
        times.sort()
        print(
          f"{name:16} {step:14} least {times[0]:6.1f}  median "
          f"{statistics.median(times):6.1f}  p90 "
          f"{times[int(0.9 * len(times))]:6.1f} ms"
        )


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--count", type=int, default=40, help="of sandboxes")
  asyncio.run(_measure(parser.parse_args().count))


if __name__ == "__main__":
  main()
