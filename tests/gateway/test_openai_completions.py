"""OpenAI's legacy Completions: raw prompts and how they are gone on from."""

import itertools

import httpx
import hypothesis
from hypothesis import strategies as st
import openai
import pytest

from forge_jax.gateway import refusal
from forge_jax.gateway.dialects import openai_completions

BASE = {"model": "m", "prompt": "hi"}
PATH = "/v1/completions"


def test_everything_that_is_honoured():
  request = openai_completions.parse(
    {
      **BASE,
      "prompt": ["a", "b"],
      "n": 2,
      "best_of": 2,
      "max_tokens": 7,
      "temperature": 0,
      "top_p": 0.5,
      "seed": 11,
      "stop": "X",
      "stream": True,
      "stream_options": {"include_usage": True},
      "logprobs": 0,
      "return_token_ids": True,
      "echo": False,
      "suffix": None,
      "user": "someone",
    }
  )
  turn = request.turns[0]
  assert (turn.max_tokens, turn.temperature, turn.top_p) == (7, 0, 0.5)
  assert turn.stop == ("X",)
  assert [(t.prompt, t.seed) for t in request.turns] == [
    ("a", 11),
    ("a", 12),
    ("b", 11),
    ("b", 12),
  ]
  assert request.stream and request.include_usage
  assert request.logprobs and request.return_token_ids


def test_what_is_not_asked_for():
  request = openai_completions.parse(BASE)
  assert request.turns[0].max_tokens == 16  # the protocol's default
  assert not (request.logprobs or request.stream or request.return_token_ids)


@pytest.mark.parametrize(
  ("prompt", "read"),
  [
    ("hi", ["hi"]),
    ([1, 2], [(1, 2)]),
    (["a", "b"], ["a", "b"]),
    ([[1], [2, 3]], [(1,), (2, 3)]),
  ],
)
def test_prompts(prompt, read):
  request = openai_completions.parse({**BASE, "prompt": prompt})
  assert [turn.prompt for turn in request.turns] == read


@pytest.mark.parametrize(
  ("change", "param"),
  [
    ({"model": None}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt[0]"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": ["a", 3]}, "prompt[1]"),
    ({"prompt": [1, -1]}, "prompt[0]"),
    ({"prompt": [1, 2**31]}, "prompt[0]"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"echo": True}, "echo"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"messages": []}, "messages"),
    ({"stop": ["", "a"]}, "stop"),
  ],
)
def test_what_is_refused_is_named(change, param):
  with pytest.raises(refusal.Refusal) as caught:
    openai_completions.parse({**BASE, **change})
  assert caught.value.param == param
  assert str(caught.value).startswith(param)
  assert openai_completions.error(caught.value)[0] == 400


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3),
  max_leaves=8,
)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
  change=st.dictionaries(
    st.sampled_from(["prompt", "n", "stop", "logprobs", "best_of", "seed"]),
    JSON,
  ),
  field=JSON,
)
def test_any_json_is_read_or_refused(change, field):
  for body in ({**BASE, **change}, {**BASE, "prompt": field}, field):
    try:
      openai_completions.parse(body)
    except refusal.Refusal as refused:
      assert openai_completions.error(refused)[0] == 400


async def say(h, keys, prompt, **body):
  """A completion that must succeed; returns its first choice."""
  status, reply = await h.post(keys, {"prompt": prompt, **body}, PATH)
  assert status == 200, reply
  return reply["choices"][0]


async def test_a_text_goes_on_with_every_sampled_id(start, tool_tokenizer):
  h = await start(tool_tokenizer)
  keys = await h.open()
  prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
  h.replies = [h.ids("a")[:-1] + h.ids(" b  c")[:-1], h.ids("d"), h.ids("e")]
  first = await say(h, keys, prompt)
  assert first["finish_reason"] == "length"  # no stop token was sampled
  more = prompt + first["text"] + "<|im_end|>\n<think>"
  second = await say(h, keys, more)
  assert second["text"] == "d"
  # The client writes the stop token as text, and so goes on from all of it.
  third = await say(h, keys, more + "d<|im_end|>\n", max_tokens=1)
  assert third["finish_reason"] == "length"
  completions, _ = await h.admin.close_session("s")
  assert [c.parent for c in completions] == [None, "s/0", "s/1"]
  assert h.text(completions[1].prompt_ids) == more
  assert h.text(completions[2].prompt_ids) == more + "d<|im_end|>\n"
  for before, after in itertools.pairwise(completions):
    seen = before.prompt_ids.tolist() + before.response_ids.tolist()
    assert after.prompt_ids.tolist()[: len(seen)] == seen


async def test_a_text_without_the_stop_token_keeps_the_ids_before_it(
  start, smollm2
):
  h = await start(smollm2)
  keys = await h.open()
  odd = h.ids("unus")[:-1] + h.ids("ual")  # not as the text would be encoded
  assert odd != h.ids("unusual")
  h.replies = [list(odd), h.ids("ok"), list(odd), h.ids("ok"), h.ids("ok")]
  first = await say(h, keys, "Say it: ")
  assert (first["text"], first["finish_reason"]) == ("unusual", "stop")
  await say(h, keys, "Say it: unusual words")
  cut = await say(h, keys, "Cut: ", stop=["ual"])
  assert cut["text"] == "unus"
  await say(h, keys, "Cut: unus, I said")
  await say(h, keys, "Say it: else")
  completions, _ = await h.admin.close_session("s")
  assert [c.fork_reason for c in completions] == [
    None,
    "cut",
    None,
    "cut",
    None,
  ]
  assert {c.parent for c in completions} == {None}
  start_ids = completions[0].prompt_ids.tolist()
  assert completions[1].prompt_ids.tolist()[
    : len(start_ids) + len(odd) - 1
  ] == (start_ids + odd[:-1])
  texts = [h.text(c.prompt_ids) for c in completions]
  assert texts[1::2] == ["Say it: unusual words", "Cut: unus, I said"]
  assert "<|im_end|>" not in texts[1]


async def test_token_ids_go_on_from_token_ids(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("one", "two", "three")
  ids = h.ids("A prompt")
  first = await say(h, keys, ids, return_token_ids=True)
  assert first["prompt_token_ids"] == ids
  assert first["token_ids"] == h.ids("one")
  longer = [*ids, *first["token_ids"], 5, 6]
  await say(h, keys, [longer, ids])
  completions, _ = await h.admin.close_session("s")
  assert [c.parent for c in completions] == [None, "s/0", None]
  assert [c.prompt_ids.tolist() for c in completions] == [ids, longer, ids]


async def test_ids_that_are_no_tokens(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  status, reply = await h.post(keys, {"prompt": [1, 2**30]}, PATH)
  assert (status, reply["error"]["param"]) == (400, "prompt")
  status, reply = await h.post(keys, {"prompt": "long " * 5000}, PATH)
  assert (status, reply["error"]["param"]) == (400, "prompt")
  assert reply["error"]["code"] == "context_length_exceeded"
  assert (await h.admin.close_session("s"))[0] == ()


SAID = [
  "Naïve café: 日本語 🙂!",
  "<think>\nhm</think> <tool_call>{}</tool_call>",
  "  two spaces, then text  ",
  "alpha END beta",
  "",
]


@pytest.mark.parametrize("said", SAID)
async def test_streamed_and_whole_replies_are_the_same(
  start, tool_tokenizer, said
):
  h = await start(tool_tokenizer, delay=0.0001)
  h.say(said, said, said, said)
  body = {
    "model": "m",
    "prompt": ["<think>\n", "b"],  # the one leaves a chat's reasoning open
    "max_tokens": 99,
    "stop": ["END"],
    "logprobs": 0,
  }
  keys = await h.open()
  status, whole = await h.post(keys, body, PATH)
  assert status == 200
  assert whole["choices"][0]["text"] == said.split("END")[0]
  client = openai.AsyncOpenAI(
    api_key=keys.api_key,
    base_url=keys.base_url,
    http_client=httpx.AsyncClient(),
    max_retries=0,
  )
  texts, tokens, offsets = ["", ""], [[], []], [[], []]
  finish, usage = {}, None
  async for chunk in await client.completions.create(
    stream=True, stream_options={"include_usage": True}, **body
  ):
    usage = chunk.usage or usage
    for choice in chunk.choices:
      texts[choice.index] += choice.text
      if choice.logprobs:
        tokens[choice.index] += choice.logprobs.tokens
        offsets[choice.index] += choice.logprobs.text_offset
      if choice.finish_reason:
        finish[choice.index] = choice.finish_reason
  await client.close()
  assert finish == {0: "stop", 1: "stop"}
  for n, choice in enumerate(whole["choices"]):
    assert texts[n] == choice["text"]
    assert tokens[n] == choice["logprobs"]["tokens"]
    assert offsets[n] == choice["logprobs"]["text_offset"]
  assert usage.to_dict() == whole["usage"]
  completions, _ = await h.admin.close_session("s")
  assert whole["usage"]["completion_tokens"] == sum(
    len(c.response_ids) for c in completions[:2]
  )
  logprobs = whole["choices"][1]["logprobs"]["token_logprobs"]
  assert logprobs == completions[1].logprobs.tolist()


async def test_a_stream_that_fails_says_so(start, smollm2):
  h = await start(smollm2, delay=0.01)
  keys = await h.open()
  h.say("word " * 100)
  async with h.http.post(
    h.gateway.url + PATH,
    json={**BASE, "stream": True, "max_tokens": 99},
    headers={"Authorization": f"Bearer {keys.api_key}"},
  ) as response:
    await response.content.readline()
    await h.admin.close_session("s")
    text = (await response.read()).decode()
  assert '"code": "aborted"' in text.strip().splitlines()[-1]
