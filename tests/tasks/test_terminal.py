import pytest

from forge_jax.agents import scripted, workspace
from forge_jax.tasks import terminal


@pytest.fixture
def domain():
  return terminal.Terminal(terminal.TerminalConfig())


def tasks_by_kind(domain):
  found = {}
  for index in range(80):
    task = domain.task("train", index)
    found.setdefault(task.payload["task"][:14], task)
  return list(found.values())


async def test_every_kind_of_work_can_be_done(domain, sandbox):
  tasks = tasks_by_kind(domain)
  assert len(tasks) >= len(terminal._KINDS)
  for task in tasks:
    environment = domain.environment(task)
    agent = workspace.WorkspaceAgent(
      scripted.ScriptedAgent(domain.script(task, "optimal")), sandbox
    )
    await agent.run(environment, None)
    assert [r.name for r in environment.rewards()] == ["done"], task


@pytest.mark.parametrize("index", range(12))
def test_what_was_to_stay_must_stay(domain, index):
  task = domain.task("train", index)
  wanted, files = task.payload["wanted"], task.payload["files"]
  right = {path: text.encode() for path, text in wanted.items()}

  def scored(left):
    environment = domain.environment(task)
    environment.collect(left)
    return {r.name: r.value for r in environment.rewards()}

  assert scored(right) == {"done": 1.0}
  assert scored({p: data + b"\n" for p, data in right.items()}) == {"done": 1.0}
  assert scored(right | {"more.txt": b"x"}) == {}
  assert scored({p: text.encode() for p, text in files.items()}) == {}
  kept = [p for p in wanted.keys() & files.keys() if wanted[p] == files[p]]
  for path in kept:
    assert scored(right | {path: b"spoilt"}) == {"damaged": -0.2}
  assert domain.environment(task).rewards() == []
