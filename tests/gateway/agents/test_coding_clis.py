"""Coding agents that are too big for every run: where they are on the PATH.

  npm install --prefix /opt/agents @anthropic-ai/claude-code@2.1.197 \
    @openai/codex@0.169.0 opencode-ai@1.18.33
  PATH=/opt/agents/node_modules/.bin:$PATH \
    pytest tests/gateway/agents/test_coding_clis.py

Each writes a program, runs it, and is asked about it by a process of its own,
told no more than docs/black_box_agents.md tells: where its model is.
"""

import json
import shutil

import pytest

TASK = "Write hello.py, which prints hello, and run it"
MORE = "What have you done?"
CODE = "print('hello')\n"


def installed(name):
  """The path of a program; skips the test if it is not there."""
  path = shutil.which(name)
  if path is None:
    pytest.skip(f"{name} is not on the PATH")
  return path


def is_main(prompt):
  """Whether a prompt is of the task, and not of its title: it shows tools."""
  return "# Tools" in prompt


def answer(stage, *replies):
  """Replies in turn to what is about the task, and a title to all else."""
  rest = iter(replies)

  def reply(prompt):
    return next(rest) if is_main(prompt) else '{"title": "Hello"}'

  stage.answer(reply)


async def check(stage, titles):
  """The task is one chain over both processes; a title is a root."""
  assert stage.greeting.with_name("hello.py").read_text() == CODE
  forest = await stage.forest()
  main = [n for n in range(len(forest)) if is_main(stage.prompt(n))]
  assert len(main) == 4
  parents = [None, *main[:-1]]
  assert [forest[n] for n in main] == [(parent, None) for parent in parents]
  sides = [forest[n] for n in range(len(forest)) if n not in main]
  assert sides == [(None, None)] * titles
  assert "hello" in stage.prompt(main[2]).rpartition("<tool_response>")[2]


async def test_claude_code(stage, call):
  claude = installed("claude")
  path = str(stage.greeting.with_name("hello.py"))
  answer(
    stage,
    "<think>\nA file.\n</think>\n\nI write it.\n"
    + call("Write", file_path=path, content=CODE),
    call("Bash", command="python3 hello.py", description="Runs it"),
    "It prints hello.",
    "A program.",
  )
  options = (
    *("--permission-mode", "acceptEdits"),
    *("--allowedTools", "Bash,Edit,Write,Read"),
  )
  for prompt, said in (
    (("-p", TASK), "It prints hello."),
    (("-c", "-p", MORE), "A program."),
  ):
    output = await stage.run(
      *(claude, *prompt, *options),
      ANTHROPIC_MODEL="policy",
      ANTHROPIC_API_KEY=stage.keys.api_key,
      ANTHROPIC_BASE_URL=stage.url,
    )
    assert output.strip() == said
  await check(stage, titles=1)


async def test_codex(stage, call):
  codex = installed("codex")
  config = stage.home / ".codex" / "config.toml"
  config.parent.mkdir()
  config.write_text(
    'model = "policy"\nmodel_provider = "forge"\n'
    '[model_providers.forge]\nname = "forge"\n'
    f'base_url = "{stage.keys.base_url}"\nenv_key = "OPENAI_API_KEY"\n'
  )
  write = "printf \"print('hello')\\n\" > hello.py"
  answer(
    stage,
    "<think>\nA file.\n</think>\n\nI write it.\n"
    + call("exec_command", cmd=write),
    call("exec_command", cmd="python3 hello.py"),
    "It prints hello.",
    "A program.",
  )
  options = (
    *("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
  )
  for prompt, said in (
    ((*options, TASK), "It prints hello."),
    (("resume", "--last", *options, MORE), "A program."),
  ):
    output = await stage.run(
      *(codex, "exec", *prompt), OPENAI_API_KEY=stage.keys.api_key
    )
    assert said in output
  await check(stage, titles=0)


@pytest.mark.parametrize(
  "protocol", ["openai-compatible", "openai", "anthropic"]
)
async def test_opencode(stage, call, protocol):
  opencode = installed("opencode")
  config = stage.home / ".config" / "opencode" / "opencode.json"
  config.parent.mkdir(parents=True)
  provider = {
    "npm": f"@ai-sdk/{protocol}",
    "options": {
      "baseURL": stage.keys.base_url,
      "apiKey": "{env:OPENAI_API_KEY}",
    },
    "models": {"policy": {"tool_call": True}},
  }
  settings = {
    "provider": {"forge": provider},
    "model": "forge/policy",
    "small_model": "forge/policy",
    "share": "disabled",
  }
  config.write_text(json.dumps(settings))
  path = str(stage.greeting.with_name("hello.py"))
  answer(
    stage,
    "I write it.\n" + call("write", filePath=path, content=CODE),
    call("bash", command="python3 hello.py", description="Runs it"),
    "It prints hello.",
    "A program.",
  )
  for prompt, said in (
    ((TASK,), "It prints hello."),
    (("-c", MORE), "A program."),
  ):
    output = await stage.run(
      *(opencode, "run", "-m", "forge/policy", *prompt),
      OPENAI_API_KEY=stage.keys.api_key,
    )
    assert said in output
  await check(stage, titles=1)
