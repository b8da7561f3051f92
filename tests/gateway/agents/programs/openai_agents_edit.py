"""Agents of `openai-agents` that edit a file: `program PROTOCOL SCENARIO TASK`.

OPENAI_BASE_URL and OPENAI_API_KEY lead to the endpoint.
"""

import asyncio
import pathlib
import sys

import agents


@agents.function_tool
def read_file(path: str) -> str:
  """Reads a file."""
  return pathlib.Path(path).read_text()


@agents.function_tool
def write_file(path: str, text: str) -> str:
  """Writes a file."""
  pathlib.Path(path).write_text(text)
  return "written"


def editor(**settings) -> agents.Agent:
  return agents.Agent(
    name="editor",
    instructions="You edit files.",
    model="policy",
    tools=[read_file, write_file],
    **settings,
  )


async def converse(task: str) -> str:
  """A streamed run, then a question about it in the same session."""
  session = agents.SQLiteSession("one")
  run = agents.Runner.run_streamed(editor(), task, session=session)
  async for _ in run.stream_events():
    pass
  question = "What have you done?"
  answer = await agents.Runner.run(editor(), question, session=session)
  return f"{run.final_output} {answer.final_output}"


async def delegate(task: str) -> str:
  """A boss has a sub-agent do the task, then hands over to a reporter."""
  reporter = agents.Agent(
    name="reporter", instructions="You report.", model="policy"
  )
  boss = agents.Agent(
    name="boss",
    instructions="You delegate.",
    model="policy",
    tools=[editor().as_tool("edit", "Edits a file.")],
    handoffs=[reporter],
  )
  return (await agents.Runner.run(boss, task)).final_output


agents.set_tracing_disabled(True)
agents.set_default_openai_api(sys.argv[1])
scenario = {"converse": converse, "delegate": delegate}[sys.argv[2]]
print(asyncio.run(scenario(sys.argv[3])))
