"""smolagents: it rewrites its own turns, so that each step is a root.

It appends to each of its turns a list of the calls that it read from it, or
writes them as text instead. What the model said is then no longer what the
history says it said, and a prompt must show what the agent sent.
"""

import pytest

SCRIPTS = {
  "CodeAgent": (
    'I look.\n<code>\ntext = read_file("greeting.txt")\nprint(text)\n</code>',
    'I write.\n<code>\nnew = text.replace("hello", "goodbye")\n'
    'write_file("greeting.txt", new)\nfinal_answer("done")\n</code>',
  ),
  "ToolCallingAgent": (
    {"name": "read_file", "path": "greeting.txt"},
    {"name": "write_file", "path": "greeting.txt", "text": "goodbye world\n"},
    {"name": "final_answer", "answer": "done"},
  ),
}


@pytest.mark.parametrize("kind", SCRIPTS)
async def test_it_edits_a_file(stage, programs, call, task, kind):
  script = SCRIPTS[kind]
  stage.say(*(s if isinstance(s, str) else call(**s) for s in script))
  output = await stage.run(
    *("python", programs / "smolagents_edit.py", kind, task),
    OPENAI_API_KEY=stage.keys.api_key,
    OPENAI_BASE_URL=stage.keys.base_url,
  )
  assert output.strip().endswith("answer: done")
  assert stage.greeting.read_text() == "goodbye world\n"
  steps = [(None, None)] + [(None, "reply")] * (len(script) - 1)
  assert await stage.forest() == steps
  assert "hello world" in stage.prompt(1)
