"""What the official clients offer beyond single requests."""

import anthropic
import openai
import pytest


@pytest.fixture
async def clients(start, tool_tokenizer):
  """A gateway with a session, and OpenAI's and Anthropic's clients of it."""
  h = await start(tool_tokenizer)
  keys = await h.open()
  async with (
    openai.AsyncOpenAI(
      api_key=keys.api_key,
      base_url=keys.base_url,
      max_retries=0,
      http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as ours,
    anthropic.AsyncAnthropic(
      api_key=keys.api_key,
      base_url=h.gateway.url,
      max_retries=0,
      http_client=anthropic.DefaultAsyncHttpxClient(trust_env=False),
    ) as theirs,
  ):
    yield h, ours, theirs


async def test_models(clients):
  _, ours, theirs = clients
  assert [model.id async for model in ours.models.list()] == ["policy"]
  assert (await ours.models.retrieve("policy")).owned_by == "forge-jax"
  with pytest.raises(openai.NotFoundError, match="'policy' only"):
    await ours.models.retrieve("another/model")
  assert [m.display_name async for m in theirs.models.list()] == ["policy"]
  model = await theirs.models.retrieve("policy")
  assert model.created_at.year == 1970 and model.max_input_tokens == 4096


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropics_tool_runner_is_one_chain(clients, call, stream):
  h, _, client = clients
  read = []

  @anthropic.beta_async_tool
  async def read_file(path: str) -> str:
    """Reads a file."""
    read.append(path)
    return "hello world"

  h.say(
    "I look.\n" + call("read_file", path="a"),
    call("read_file", path="b") + "\n" + call("read_file", path="c"),
    "Both say hello.",
  )
  runner = client.beta.messages.tool_runner(
    model="policy",
    max_tokens=100,
    tools=[read_file],
    messages=[{"role": "user", "content": "What do they say?"}],
    stream=stream,
  )
  final = await runner.until_done()
  assert final.content[0].text == "Both say hello."
  assert read == ["a", "b", "c"]
  completions, _ = await h.admin.close_session("s")
  assert [c.parent for c in completions] == [None, "s/0", "s/1"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_rewind_is_a_branch(clients, stream):
  h, client, _ = clients
  messages = [{"role": "user", "content": "?"}]

  async def ask(*said):
    if not stream:
      made = await client.chat.completions.create(
        model="policy", messages=[*messages, *said]
      )
    else:
      async with client.chat.completions.stream(
        model="policy", messages=[*messages, *said]
      ) as events:
        async for _ in events:
          pass
        made = await events.get_final_completion()
    return {"role": "assistant", "content": made.choices[0].message.content}

  h.say("1", "2", "3")
  first = await ask()
  await ask(first, {"role": "user", "content": "left"})
  await ask(first, {"role": "user", "content": "right"})
  one, left, right = (await h.admin.close_session("s"))[0]
  assert left.parent == right.parent == one.id
  seen = [*one.prompt_ids, *one.response_ids]
  for branch in (left, right):
    assert branch.prompt_ids[: len(seen)].tolist() == seen
