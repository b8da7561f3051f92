"""A taskset as one is written for `verifiers`: words to be said backwards."""

import verifiers.v1 as vf


class ReverseData(vf.TaskData):
  """A word's reverse, beside its prompt."""

  answer: str


class ReverseTask(vf.Task[ReverseData]):
  """Pays for the right answer, and a little for a short one."""

  @vf.reward
  async def exact(self, trace: vf.Trace) -> float:
    """Whether the answer is there."""
    return float(self.data.answer in (trace.last_reply or ""))

  @vf.reward(weight=0.25)
  async def short(self, trace: vf.Trace) -> float:
    """Whether little else is."""
    return float(len(trace.last_reply or "") < 20)

  @vf.metric
  async def length(self, trace: vf.Trace) -> float:
    """How long the answer is."""
    return float(len(trace.last_reply or ""))


class ReverseWords(vf.Taskset[ReverseTask, vf.TasksetConfig]):
  """Three words."""

  def load(self):
    """Yields the tasks."""
    for word in ("stressed", "drawer", "lager"):
      data = ReverseData(prompt=f"Say {word!r} backwards.", answer=word[::-1])
      yield ReverseTask(data, self.config.task)


__all__ = ["ReverseWords"]
