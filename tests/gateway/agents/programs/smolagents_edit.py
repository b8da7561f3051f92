"""An agent of `smolagents` that edits a file: `program CLASS TASK`.

OPENAI_BASE_URL and OPENAI_API_KEY lead to the endpoint.
"""

import os
import pathlib
import sys

import smolagents


@smolagents.tool
def read_file(path: str) -> str:
  """Reads a file.

  Args:
    path: which.
  """
  return pathlib.Path(path).read_text()


@smolagents.tool
def write_file(path: str, text: str) -> str:
  """Writes a file.

  Args:
    path: which.
    text: its new content.
  """
  pathlib.Path(path).write_text(text)
  return "written"


model = smolagents.OpenAIModel(
  "policy",
  api_base=os.environ["OPENAI_BASE_URL"],
  api_key=os.environ["OPENAI_API_KEY"],
  # By default a ToolCallingAgent asks for "required".
  tool_choice="auto",
)
agent = getattr(smolagents, sys.argv[1])(
  tools=[read_file, write_file], model=model, stream_outputs=True
)
print("answer:", agent.run(sys.argv[2]))
