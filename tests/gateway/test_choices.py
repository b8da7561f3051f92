"""Several choices of one request."""

import httpx
import openai
import pytest


def user(text):
  return {"role": "user", "content": text}


async def test_choices_are_sampled_apart_and_all_recorded(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("one", "two", "three")
  reply = await h.chat(keys, [user("?")], n=3)
  said = [c["message"]["content"] for c in reply["choices"]]
  assert sorted(said) == ["one", "three", "two"]
  assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
  assert reply["usage"]["completion_tokens"] == sum(
    len(h.ids(text)) for text in said
  )
  assert len({r.sampling.seed for r in h.requests}) == 3
  # Whichever choice the client goes on with is extended.
  for text in said:
    h.say("more")
    go_on = [user("?"), {"role": "assistant", "content": text}, user("go on")]
    await h.chat(keys, go_on)
  completions, _ = await h.admin.close_session("s")
  assert len(completions) == 6
  assert {c.parent for c in completions[3:]} == {c.id for c in completions[:3]}


async def test_streamed_choices_interleave(start, smollm2):
  h = await start(smollm2, delay=0.001)
  keys = await h.open()
  texts = ["one two three four", "five six seven"]
  h.say(*texts)
  client = openai.AsyncOpenAI(
    api_key=keys.api_key,
    base_url=keys.base_url,
    http_client=httpx.AsyncClient(),
    max_retries=0,
  )
  said, order, finish = ["", ""], [], {}
  async for chunk in await client.chat.completions.create(
    model="m", messages=[user("?")], n=2, stream=True
  ):
    for choice in chunk.choices:
      said[choice.index] += choice.delta.content or ""
      order.append(choice.index)
      if choice.finish_reason:
        finish[choice.index] = choice.finish_reason
  await client.close()
  assert sorted(said) == sorted(texts)
  assert finish == {0: "stop", 1: "stop"}
  assert order != sorted(order)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_that_fails_ends_the_others(start, smollm2, stream):
  h = await start(smollm2, delay=0.001, max_context=64)
  keys = await h.open()
  h.say("one " * 30)  # the second choice finds no reply: the engine fails
  status, reply = await h.post(
    keys, {"messages": [user("?")], "n": 2, "stream": stream}
  )
  assert status == 500 and "error" in reply
  completions, _ = await h.admin.close_session("s")
  assert all(c.stop_reason == "abort" for c in completions)
  assert h.engine.stats()["running"] == 0
