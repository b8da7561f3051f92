"""Recording from an OpenAI-compatible server: exact, or refused."""

import json

from aiohttp import web
from engine_servers import chunks, joined, request
import pytest

from forge_jax import errors, types
from forge_jax.engine import api, openai_completions


class Upstream:
  """Streams completions in vLLM's shape; `edit` may change each choice.

  The shape is that of vLLM's `CompletionStreamResponse` with
  `return_token_ids`: ids per part, the prompt's on the first.
  """

  def __init__(self, edit=None, models=None):
    self._edit = edit or (lambda choice, number: choice)
    self._models = models or [{"id": "m", "max_model_len": 64}]
    self.bodies = []

  async def __aenter__(self):
    app = web.Application()
    app.router.add_get("/v1/models", self._list)
    app.router.add_post("/v1/completions", self._complete)
    self._runner = web.AppRunner(app)
    await self._runner.setup()
    await web.TCPSite(self._runner, "127.0.0.1", 0).start()
    self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
    return self

  async def __aexit__(self, *_):
    await self._runner.cleanup()

  async def _list(self, http):
    return web.json_response({"object": "list", "data": self._models})

  async def _complete(self, http):
    body = await http.json()
    self.bodies.append(body)
    response = web.StreamResponse()
    await response.prepare(http)
    count = min(body["max_tokens"], 4)
    for number in range(count):
      last = number == count - 1
      choice = {
        "index": 0,
        "text": f"t{number}",
        "logprobs": {
          "text_offset": [0],
          "token_logprobs": [-0.25 * (number + 1)],
          "tokens": [f"t{number}"],
          "top_logprobs": [None],
        },
        "finish_reason": "length" if last else None,
        "stop_reason": None,
        "token_ids": [40 + number],
      }
      if number == 0:
        choice["prompt_token_ids"] = body["prompt"]
      await self._send(response, choices=[self._edit(choice, number)])
    await self._send(response, choices=[], usage={"completion_tokens": count})
    await response.write(b"data: [DONE]\n\n")
    return response

  async def _send(self, response, **value):
    await response.write(f"data: {json.dumps(value)}\n\n".encode())


async def connected(upstream, **config):
  made = openai_completions.CompletionsEngine(
    openai_completions.CompletionsConfig(
      url=upstream.url, patience=0.2, **config
    )
  )
  await made.connect()
  return made


async def test_ids_and_logprobs_are_recorded_as_sampled():
  async with Upstream() as upstream:
    made = await connected(upstream, version=3)
    assert made.max_context == 64
    asked = request("r", [5, 6], stop_token_ids=(2,), stop_strings=("x",))
    found = await chunks(made, asked)
    assert joined(found, "token_ids") == [40, 41, 42, 43]
    assert joined(found, "logprobs") == [-0.25, -0.5, -0.75, -1.0]
    assert joined(found, "versions") == [3] * 4
    assert found[-1].stop_reason == types.StopReason.LENGTH
    assert all(chunk.stop_reason is None for chunk in found[:-1])
    body = upstream.bodies[-1]
    assert body["prompt"] == [5, 6] and body["return_token_ids"] is True
    assert body["stop_token_ids"] == [2] and body["stop"] == ["x"]
    assert "top_p" not in body  # strict servers know no extensions
    await made.aclose()


async def test_everything_in_one_part_is_read_too():
  def edit(choice, number):
    return choice | {
      "token_ids": [7, 8],
      "logprobs": {"token_logprobs": [-1.0, -2.0]},
    }

  async with Upstream(edit) as upstream:
    made = await connected(upstream)
    found = await chunks(made, request("r", max_tokens=1))
    assert joined(found, "token_ids") == [7, 8]
    await made.aclose()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"token_ids": None}, "recording only: it returned no token_ids"),
    ({"prompt_token_ids": None}, "a prompt of 1 tokens it returned none"),
    ({"prompt_token_ids": [1, 0]}, "it returned other ids, 2 of them"),
    ({"logprobs": None}, "1 token_ids, 0 token_logprobs"),
    ({"logprobs": {"token_logprobs": [None]}}, "malformed"),
    ({"finish_reason": "magic"}, "malformed.*'magic'"),
  ],
)
async def test_a_server_that_is_not_exact_is_refused(changes, message):
  async with Upstream(lambda choice, _: choice | changes) as upstream:
    with pytest.raises(errors.EngineError, match=message):
      await connected(upstream)


async def test_a_server_without_a_context_needs_one_in_the_configuration():
  async with Upstream(models=[{"id": "gpt"}]) as upstream:
    with pytest.raises(errors.EngineError, match="max_model_len"):
      await connected(upstream)
    made = await connected(upstream, max_context=100)
    assert made.max_context == 100
    await made.aclose()
  async with Upstream() as upstream:
    with pytest.raises(errors.EngineError, match="no model 'other'"):
      await connected(upstream, model="other")


async def test_an_error_in_the_stream_keeps_what_came_before():
  def edit(choice, number):
    if number == 2:
      raise RuntimeError
    return choice

  async with Upstream() as upstream:
    made = await connected(upstream)
    upstream._edit, found = edit, []
    with pytest.raises(errors.EngineUnavailableError):
      async for chunk in made.generate(request("r")):
        found.append(chunk)
    assert joined(found, "token_ids") == [40, 41]
    await made.aclose()


@pytest.mark.parametrize(
  ("sampling", "message"),
  [
    ({"temperature": 0.5}, "exact_logprobs"),
    ({"top_p": 0.9}, "exact_logprobs"),
    ({"presence_penalty": 1.0}, "exact_logprobs"),
    ({"grammar": "start: /a/"}, "grammar"),
    ({"top_logprobs": 2}, "top_logprobs"),
  ],
)
async def test_what_would_not_be_exact_is_refused(sampling, message):
  async with Upstream() as upstream:
    made = await connected(upstream)
    assert await chunks(made, request("greedy", temperature=0.0))
    with pytest.raises(errors.EngineError, match=message):
      await chunks(made, request("r", **sampling))
    await made.aclose()
    if "exact_logprobs" in message:
      made = await connected(upstream, exact_logprobs=False)
      assert await chunks(made, request("r", **sampling))
      [[name, value]] = sampling.items()
      assert upstream.bodies[-1][name] == value
      await made.aclose()


async def test_controls_say_that_it_only_records():
  made = openai_completions.CompletionsEngine(
    openai_completions.CompletionsConfig("http://127.0.0.1:1")
  )
  for control in (
    made.flush_cache,
    made.pause,
    made.resume,
    lambda: made.update_weights(types.WeightsVersion(1, path="v1")),
  ):
    with pytest.raises(errors.EngineError, match="for recording only"):
      control()
  bias = api.SamplingParams(max_tokens=1, logit_bias=((3, 1.0),))
  body = made._body(api.GenerateRequest("r", (1,), bias))
  assert body["logit_bias"] == {"3": 1.0}
