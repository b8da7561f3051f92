"""The coding agent pi, from npm, in each of the protocols that it speaks."""

import json
import shutil

import pytest

# Its base URL is the root of the Messages protocol, and /v1 of OpenAI's.
PROTOCOLS = {
  "openai-completions": "/v1",
  "openai-responses": "/v1",
  "anthropic-messages": "",
}


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_it_edits_a_file_while_thinking(stage, call, task, protocol):
  provider = {
    "baseUrl": stage.url + PROTOCOLS[protocol],
    "api": protocol,
    "apiKey": stage.keys.api_key,
    "models": [{"id": "policy", "reasoning": True}],
  }
  config = stage.home / ".pi" / "agent" / "models.json"
  config.parent.mkdir(parents=True)
  config.write_text(json.dumps({"providers": {"forge": provider}}))
  edit = {"oldText": "hello", "newText": "goodbye"}
  stage.say(
    "I look first.\n" + call("read", path="greeting.txt"),
    "<think>\nTwo at once.\n</think>\n\n"
    + call("edit", path="greeting.txt", edits=[edit])
    + "\n"
    + call("bash", command="printf '%s-%s' side by-side"),
    "<think>\nIt worked.\n</think>\n\nDone: it says goodbye.",
  )
  model = ("--provider", "forge", "--model", "policy")
  output = await stage.run(
    "pi", "--offline", "--no-session", *model, "-p", task
  )
  assert output.strip() == "Done: it says goodbye."
  assert stage.greeting.read_text() == "goodbye world\n"
  assert await stage.forest() == [(None, None), (0, None), (1, None)]
  assert "side-by-side" in stage.prompt(2)
