"""The openai-agents SDK over both of OpenAI's protocols."""

import pytest

PROTOCOLS = ("chat_completions", "responses")


async def run(stage, programs, *arguments):
  return await stage.run(
    *("python", programs / "openai_agents_edit.py", *arguments),
    OPENAI_API_KEY=stage.keys.api_key,
    OPENAI_BASE_URL=stage.keys.base_url,
  )


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_session_is_one_chain(stage, programs, call, task, protocol):
  stage.say(
    "I look first.\n" + call("read_file", path="greeting.txt"),
    call("write_file", path="greeting.txt", text="goodbye world\n"),
    "Done.",
    "I wrote a file.",
  )
  output = await run(stage, programs, protocol, "converse", task)
  assert output.strip() == "Done. I wrote a file."
  assert stage.greeting.read_text() == "goodbye world\n"
  chain = [(None, None), (0, None), (1, None), (2, None)]
  assert await stage.forest() == chain


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_sub_agent_is_a_root_and_a_handoff_another(
  stage, programs, call, task, protocol
):
  stage.say(
    call("edit", input="Write goodbye."),
    call("write_file", path="greeting.txt", text="goodbye world\n"),
    "Written.",
    call("transfer_to_reporter"),
    "The file says goodbye.",
  )
  output = await run(stage, programs, protocol, "delegate", task)
  assert output.strip() == "The file says goodbye."
  assert stage.greeting.read_text() == "goodbye world\n"
  assert await stage.forest() == [
    (None, None),  # the boss
    (None, None),  # the sub-agent
    (1, None),
    (0, None),  # the boss again
    (None, "history"),  # the reporter: his instructions, the boss's turns
  ]
