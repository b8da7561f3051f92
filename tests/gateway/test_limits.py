"""Figures, and what happens when more is asked than can be served."""

import asyncio
import json

from prometheus_client import parser

from forge_jax import types
from forge_jax.gateway import serving


def user(text):
  return {"role": "user", "content": text}


async def scrape(h, token=None):
  headers = {"Authorization": f"Bearer {token or h.gateway.admin_token}"}
  async with h.http.get(h.gateway.url + "/metrics", headers=headers) as reply:
    text = await reply.text()
    if reply.status != 200:
      return reply.status
  return {
    (sample.name.removeprefix("forge_gateway_"), *sample.labels.values()): (
      sample.value
    )
    for family in parser.text_string_to_metric_families(text)
    for sample in family.samples
  }


async def test_the_figures_are_those_of_what_was_served(start, smollm2):
  h = await start(smollm2)
  keys = await h.open()
  h.say("one", "two", "three")
  messages = [user("?")]
  first = await h.chat(keys, messages)
  messages += [first["choices"][0]["message"], user("go on")]
  second = await h.chat(keys, messages)
  changed = [user("?"), {"role": "assistant", "content": "no"}, user("go on")]
  third = await h.chat(keys, changed)
  await h.post(keys, {"messages": []})
  figures = await scrape(h)
  usages = [reply["usage"] for reply in (first, second, third)]
  assert figures["sampled_tokens_total",] == sum(
    u["completion_tokens"] for u in usages
  )
  assert figures["prompt_tokens_total",] == sum(
    u["prompt_tokens"] for u in usages
  )
  assert figures["reused_tokens_total",] == usages[0]["total_tokens"]
  assert figures["completions_total", "stop"] == 3
  assert figures["forks_total", "reply"] == 1
  assert figures["sessions",] == 1
  assert figures["requests_total", "/v1/chat/completions", "200"] == 3
  assert figures["requests_total", "/v1/chat/completions", "400"] == 1
  assert figures["request_seconds_count", "/chat/completions"] == 3
  assert await scrape(h, "wrong") == 401
  assert await scrape(h, keys.api_key) == 401


async def test_too_many_requests_are_told_when_to_come_back(start, smollm2):
  h = await start(smollm2, delay=0.02, max_running=1, max_waiting=1)
  keys = await h.open()
  h.say("one two three four five", "six")
  ask = {"messages": [user("?")]}
  tasks = []
  for waiting in (0, 1):
    tasks.append(asyncio.create_task(h.post(keys, ask)))
    while (await scrape(h))["waiting",] != waiting or not h.requests:
      await asyncio.sleep(0.005)
  headers = {"Authorization": f"Bearer {keys.api_key}"}
  async with h.http.post(
    h.gateway.url + "/v1/chat/completions",
    json={"model": "m", **ask},
    headers=headers,
  ) as reply:
    assert reply.status == 429
    assert int(reply.headers["Retry-After"]) >= 1
    assert (await reply.json())["error"]["code"] == "rate_limit_exceeded"
  assert [status for status, _ in await asyncio.gather(*tasks)] == [200, 200]
  figures = await scrape(h)
  assert figures["running",] == figures["waiting",] == 0


async def test_a_client_that_stops_reading_holds_nothing(
  start, smollm2, monkeypatch
):
  monkeypatch.setattr(serving, "_STALL_SECONDS", 0.2)
  h = await start(smollm2, max_running=1, max_context=2**20)
  keys = await h.open()
  # More events than the sockets' buffers hold.
  h.say("word " * 100_000, "next")
  body = json.dumps(
    {"model": "m", "messages": [user("?")], "stream": True, "logprobs": True}
  ).encode()
  host, port = h.gateway.url.removeprefix("http://").split(":")
  _, writer = await asyncio.open_connection(host, port, limit=1)
  head = (
    f"POST /s/{keys.api_key}/v1/chat/completions HTTP/1.1\r\nHost: g\r\n"
    f"Content-Length: {len(body)}\r\n\r\n"
  )
  writer.write(head.encode() + body)
  reply = await h.chat(keys, [user("?")])
  assert reply["choices"][0]["message"]["content"] == "next"
  completions, _ = await h.admin.close_session("s")
  assert len(completions) == 2
  assert completions[0].stop_reason == types.StopReason.STOP
  writer.close()
