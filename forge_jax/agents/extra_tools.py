"""Tools that an agent brings along, beside those of its environment."""

import asyncio
from collections.abc import (
  AsyncIterator,
  Awaitable,
  Callable,
  Mapping,
  Sequence,
)
import contextlib
import dataclasses

from forge_jax import types
from forge_jax.agents import base
from forge_jax.tasks import base as tasks_base


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
  """One tool."""

  specification: types.Message  # in the OpenAI wire format
  # The result of a call, given the arguments as the model wrote them.
  work: Callable[[str], Awaitable[str]]


class Equipped:
  """An environment with further tools.

  The calls of one reply are worked on at the same time, and so is what the
  environment answers to its own. Results come in the order of the calls. What
  a tool raises is raised as it is, when no other call is under way any more.
  """

  def __init__(self, inner: tasks_base.Environment, tools: Mapping[str, Tool]):
    """Adds tools, by the names that they are called by."""
    self._inner = inner
    self._extra = tools

  @property
  def tools(self) -> Sequence[types.Message]:
    return [
      *self._inner.tools,
      *(tool.specification for tool in self._extra.values()),
    ]

  def reset(self) -> types.Messages:
    return self._inner.reset()

  async def respond(self, reply: types.Message) -> types.Messages | None:
    calls = reply.get("tool_calls") or []
    mine = [call for call in calls if call["function"]["name"] in self._extra]
    others = [call for call in calls if call not in mine]
    if not mine:
      return await base.respond(self._inner, reply)
    async with _together() as group:
      tasks = [group.create_task(self._answer(call)) for call in mine]
      rest: types.Messages | None = ()
      if others:
        own = {**reply, "tool_calls": others}
        rest = await base.respond(self._inner, own)
    if rest is None:
      return None
    messages = [*rest, *(task.result() for task in tasks)]
    places = {call["id"]: place for place, call in enumerate(calls)}
    last = len(places)  # what answers no call comes after what does
    return sorted(
      messages, key=lambda m: places.get(m.get("tool_call_id"), last)
    )

  def rewards(self):
    return self._inner.rewards()

  async def _answer(self, call) -> types.Message:
    tool = self._extra[call["function"]["name"]]
    result = await tool.work(call["function"]["arguments"])
    return {"role": "tool", "tool_call_id": call["id"], "content": result}


@contextlib.asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
  """A group of tasks; the first failure is raised as it is."""
  try:
    async with asyncio.TaskGroup() as group:
      yield group
  except ExceptionGroup as failures:
    raise failures.exceptions[0] from failures
