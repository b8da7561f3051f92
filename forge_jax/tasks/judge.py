"""Scores answers that must be parsed, in a sandbox, many at a time.

Invariants:
  1. Nothing that a model wrote is parsed in this process: SymPy's parser
     evaluates what it reads.
  2. Every answer is judged in a process of its own, so that none changes what
     is said of another; one that takes too long is wrong.
  3. Answers that arrive while others are being judged wait and go together,
     because importing what judges takes seconds and judging milliseconds.
"""

import asyncio
from collections.abc import Mapping
import json
import os
import pathlib
import sysconfig
from typing import Any

from forge_jax import errors
from forge_jax.agents.sandbox import base as sandbox_base

_GUEST = pathlib.Path(__file__).with_name("judge_guest.py")
_MOST = 32  # answers that go together
_START_SECONDS = 60.0  # until what judges is imported


def packages() -> str:
  """The folder of installed packages: a sandbox that judges must show it."""
  return os.path.realpath(sysconfig.get_paths()["purelib"])


class Judge:
  """Judges answers; used from one asyncio loop at a time."""

  def __init__(self, sandbox: sandbox_base.Backend, seconds: float = 5.0):
    """Prepares to judge.

    Args:
      sandbox: whose sandboxes show `packages()`.
      seconds: wall-clock for one answer.
    """
    self._sandbox = sandbox
    self._seconds = seconds
    self._waiting: list[tuple[Mapping[str, Any], asyncio.Future]] = []
    self._worker: asyncio.Task | None = None

  async def is_right(self, case: Mapping[str, Any]) -> bool:
    """Judges a case; `judge_guest` says what is in it.

    Raises:
      SandboxError: the answer could not be judged.
    """
    future = asyncio.get_running_loop().create_future()
    self._waiting.append((case, future))
    if self._worker is None or self._worker.done():
      self._worker = asyncio.create_task(self._work())
    return await future

  async def _work(self) -> None:
    while self._waiting:
      batch, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
      try:
        verdicts = await self._judge([case for case, _ in batch])
      except Exception as failure:  # whoever waits for a verdict shall see it
        for _, future in batch:
          if not future.done():
            future.set_exception(failure)
        continue
      for (_, future), verdict in zip(batch, verdicts, strict=True):
        if not future.done():
          future.set_result(verdict)

  async def _judge(self, cases: list[Mapping[str, Any]]) -> list[bool]:
    async with await self._sandbox.open() as box:
      await box.put({"judge.py": _GUEST.read_bytes()})
      result = await box.run(
        ["python3", "judge.py", str(self._seconds)],
        seconds=_START_SECONDS + self._seconds * len(cases),
        env={"PYTHONPATH": packages()},
        stdin=json.dumps(cases).encode(),
      )
    try:
      verdicts = json.loads(result.stdout)
    except (ValueError, RecursionError):
      verdicts = None
    if not isinstance(verdicts, list) or len(verdicts) != len(cases):
      raise errors.SandboxError(
        f"no verdict on {len(cases)} answers: {result.failure}: "
        f"{result.stderr[-500:].decode(errors='replace')}"
      )
    return [verdict is True for verdict in verdicts]
