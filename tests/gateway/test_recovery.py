"""A gateway that ends in whatever way, and the next one of its journal."""

import asyncio
import concurrent.futures
import contextlib
import json
import shutil
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from forge_jax import client, errors, types
from forge_jax.gateway import (
  addition,
  attempts,
  journal,
  records,
  replay,
  scripted,
  server,
  session_table,
  sessions,
)
from forge_jax.pool import segment

TOOL = {
  "type": "function",
  "function": {
    "name": "f",
    "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
  },
}


def user(text):
  return {"role": "user", "content": text}


def says(text, reasoning=None):
  message = {"role": "assistant", "content": text}
  return message | ({"reasoning_content": reasoning} if reasoning else {})


class Restarting:
  """Gateways, one after another, each from a copy of the last one's journal.

  The copy is made while the gateway runs: it is what a crash would leave.
  """

  def __init__(self, folder, replies):
    self._folder = folder
    self._replies = iter(replies)
    self._stack = contextlib.ExitStack()
    self._count = 0
    self.restart()

  def restart(self):
    old, new = (self._folder / str(self._count + n) for n in (0, 1))
    if self._count:
      shutil.copytree(old, new)
    self._stack.close()
    self._count += 1
    config = server.GatewayConfig(admin_token="admin", journal=str(new))
    self.gateway = self._stack.enter_context(
      scripted.serve(lambda _: next(self._replies), config=config)
    )

  def close(self):
    self._stack.close()

  def post(self, path, key, body):
    reply = httpx.post(
      self.gateway.url + path,
      json=body,
      headers={"Authorization": f"Bearer {key}"},
      timeout=30,
    )
    assert reply.status_code == 200, reply.text
    return reply

  def open(self, id):
    return self.post("/admin/sessions", "admin", {"id": id, "seed": 1}).json()

  def forest(self, id):
    return httpx.get(
      f"{self.gateway.url}/admin/sessions/{id}/forest",
      headers={"Authorization": "Bearer admin"},
    ).json()

  def ended(self, id, keys):
    closed = self.post(f"/sessions/{id}/close", keys["control_key"], {})
    return closed.json()


@pytest.fixture
def restarting(tmp_path):
  with contextlib.ExitStack() as stack:

    def make(name, replies):
      made = Restarting(tmp_path / name, replies)
      stack.callback(made.close)
      return made

    (tmp_path / "once").mkdir()
    (tmp_path / "always").mkdir()
    yield make


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "1"}}\n</tool_call>'
REPLIES = ("one", CALL, "three", "four", "<think>hm</think>five", "six")
MORE = ("raw one", "raw two", "seven", "eight", "nine", "ten", "eleven")


TIMES = ("started", "first_token", "finished")


def requests():
  """What an agent sends, turn by turn: (path, body)."""
  call = {"id": "other", "type": "function"}
  call["function"] = {"name": "f", "arguments": '{ "x":"1" }'}
  called = {"role": "assistant", "content": None, "tool_calls": [call]}
  result = {"role": "tool", "tool_call_id": "other", "content": "ok"}
  begun = [user("a"), says("one"), user("b")]
  chat = [
    [user("a")],
    begun,
    [*begun, called, result],  # its arguments are spelt differently
    [user("a"), says(" one\n"), user("rewound")],
    [user("a"), says("edited"), user("b")],  # a fork
    [user("a"), says("edited"), user("b"), says("five"), user("c")],
  ]
  path = "/v1/chat/completions"
  tools = {"model": "m", "tools": [TOOL]}
  yield from ((path, {**tools, "messages": messages}) for messages in chat)
  raw = "/v1/completions"
  yield raw, {"model": "m", "prompt": "once upon"}
  yield raw, {"model": "m", "prompt": "once uponraw one a time"}
  path = "/v1/chat/completions"
  yield path, {"model": "m", "messages": begun}  # without the tools
  yield path, {**tools, "messages": [user("summary of it all")]}
  yield path, {**tools, "messages": chat[0], "stream": True}
  yield path, {**tools, "messages": [*chat[0], says("ten"), user("d")]}
  yield (
    "/v1/messages",
    {
      "model": "m",
      "max_tokens": 9,
      "messages": [user("a")],
      "tools": [{"name": "f", "input_schema": TOOL["function"]["parameters"]}],
    },
  )


def without_times(shown):
  """A closed session or a forest, its times checked and taken out."""
  shown = json.loads(json.dumps(shown))
  for one in shown.get("completions") or shown["nodes"]:
    times = [one[k] for k in TIMES if k in one]
    if one.get("request"):
      times.insert(0, one["request"].pop("arrived"))
    assert times == sorted(times) and all(0 <= t < 600 for t in times)
    for name in TIMES:
      one.pop(name, None)
  return shown


def test_a_gateway_that_dies_after_every_request_forgets_nothing(restarting):
  once = restarting("once", REPLIES + MORE)
  always = restarting("always", REPLIES + MORE)
  keys = [each.open("s") for each in (once, always)]
  for path, body in requests():
    for each, key in zip((once, always), keys, strict=True):
      each.post(path, key["api_key"], body)
      each.post(
        "/sessions/s/reward",
        key["control_key"],
        {"rewards": [{"name": "r", "value": 0.5, "step": 0}]},
      )
    always.restart()
    forests = [without_times(each.forest("s")) for each in (once, always)]
    assert forests[0] == forests[1]
  ended = [
    without_times(each.ended("s", key))
    for each, key in zip((once, always), keys, strict=True)
  ]
  assert ended[0] == ended[1]
  completions = ended[0]["completions"]
  assert len(completions) == len(ended[0]["rewards"]) == 13
  parents = [c["parent"] for c in completions]
  assert parents[:5] == [None, "s/0", "s/1", "s/0", None]
  assert parents[5] == "s/4"
  assert completions[7]["fork_reason"] == "cut"  # it goes on from raw text


def test_the_seeds_go_on_where_they_were(restarting):
  once, always = restarting("once", "abc"), restarting("always", "abc")
  keys = [each.open("s") for each in (once, always)]
  seeds = [[], []]
  for text in "abc":
    for each, key, found in zip((once, always), keys, seeds, strict=True):
      body = {"model": "m", "messages": [user(text)]}
      each.post("/v1/chat/completions", key["api_key"], body)
      found.append(each.gateway.requests[-1].sampling.seed)
    always.restart()
  assert seeds[0] == seeds[1] and len(set(seeds[0])) == 3


def test_stored_responses_are_there_again(restarting):
  each = restarting("once", ("one", "two", "three", "four"))
  key = each.open("s")["api_key"]
  first = each.post("/v1/responses", key, {"model": "m", "input": "a"}).json()
  each.restart()
  body = {"model": "m", "input": "b", "previous_response_id": first["id"]}
  second = each.post("/v1/responses", key, body).json()
  httpx.delete(
    f"{each.gateway.url}/v1/responses/{first['id']}",
    headers={"Authorization": f"Bearer {key}"},
  ).raise_for_status()
  each.restart()
  body = {"model": "m", "input": "c", "previous_response_id": second["id"]}
  each.post("/v1/responses", key, body)  # which follows one that is deleted
  nodes = each.forest("s")["nodes"]
  assert [n["parent"] for n in nodes[::2]] == [None, "s/0", "s/1"]
  got = httpx.get(
    f"{each.gateway.url}/v1/responses/{first['id']}",
    headers={"Authorization": f"Bearer {key}"},
  )
  assert got.status_code == 404


def test_a_closed_session_stays_closed(restarting):
  each = restarting("once", ("one", "two"))
  keys = each.open("s"), each.open("t")
  body = {"model": "m", "messages": [user("a")]}
  for key in keys:
    each.post("/v1/chat/completions", key["api_key"], body)
  ended = each.ended("s", keys[0])
  each.restart()
  for _ in range(2):  # it may be asked for again, but asks for nothing
    assert each.ended("s", keys[0]) == ended
    with pytest.raises(AssertionError, match="invalid_api_key"):
      each.post("/v1/chat/completions", keys[0]["api_key"], body)
  assert len(each.ended("t", keys[1])["completions"]) == 1
  each.restart()
  again = each.open("s")  # the name is free
  assert each.ended("s", again) == {"completions": [], "rewards": []}


SERVER = """
import sys
from forge_jax.gateway import scripted, server, session_table
config = server.GatewayConfig(admin_token="admin", journal=sys.argv[1])
with scripted.serve(lambda r: "said " + str(len(r.prompt_ids)),
                    config=config) as gateway:
  print(gateway.url, flush=True)
  sys.stdin.read()
"""


def spawn(folder):
  process = subprocess.Popen(
    [sys.executable, "-c", SERVER, str(folder)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  return process, process.stdout.readline().strip()


def play(url, name, got, lost):
  """Asks until the gateway is gone; keeps what was acknowledged."""
  with httpx.Client(base_url=url, timeout=30) as http:
    admin = {"Authorization": "Bearer admin"}
    keys = http.post("/admin/sessions", json={"id": name}, headers=admin).json()
    headers = {"Authorization": f"Bearer {keys['api_key']}"}
    got[name] = keys, []
    messages = []
    try:
      while True:
        messages.append(user("again"))
        body = {"model": "m", "messages": messages, "return_token_ids": True}
        reply = http.post(
          "/v1/chat/completions", json=body, headers=headers
        ).json()["choices"][0]
        got[name][1].append(reply["token_ids"])
        messages.append(reply["message"])
    except httpx.HTTPError:
      lost.append(name)


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
  process, url = spawn(tmp_path)
  got, lost = {}, []
  with process, concurrent.futures.ThreadPoolExecutor(4) as threads:
    for n in range(4):
      threads.submit(play, url, f"s{n}", got, lost)
    while sum(len(replies) for _, replies in list(got.values())) < 80:
      assert process.poll() is None
      time.sleep(0.01)
    process.kill()
  assert len(lost) == len(got) == 4
  process, url = spawn(tmp_path)
  with process:
    for name, (keys, replies) in got.items():
      closed = httpx.post(
        f"{url}/sessions/{name}/close",
        headers={"Authorization": f"Bearer {keys['control_key']}"},
        json={},
      ).json()["completions"]
      sampled = [c["response_ids"] for c in closed]
      assert sampled[: len(replies)] == replies
      assert len(sampled) <= len(replies) + 1  # one may not have arrived
      for n, completion in enumerate(closed):
        assert completion["parent"] == (f"{name}/{n - 1}" if n else None)
        assert len(completion["logprobs"]) == len(completion["response_ids"])
        assert np.isfinite(completion["logprobs"]).all()
    process.stdin.close()


def test_a_close_whose_answer_was_lost_may_be_sent_again(tmp_path):
  with scripted.serve(["one"]) as gateway:
    with client.open_session(gateway.url, gateway.admin_token, "s") as session:
      httpx.post(
        f"{session.base_url}/chat/completions",
        json={"model": "m", "messages": [user("?")]},
        headers={"Authorization": f"Bearer {session.api_key}"},
      ).raise_for_status()
      asyncio.run(close_and_leave(gateway, session))
    assert len(session.completions) == 1


async def close_and_leave(gateway, session):
  """Asks for a close and is gone before the answer."""
  host, port = gateway.url.removeprefix("http://").split(":")
  _, writer = await asyncio.open_connection(host, port)
  writer.write(
    b"POST /sessions/s/close HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer "
    + session.control_key.encode()
    + b"\r\nContent-Length: 2\r\n\r\n"
  )
  await writer.drain()
  writer.transport.abort()
  await asyncio.sleep(0.05)


def test_a_closed_session_is_forgotten_in_time(tmp_path, monkeypatch):
  monkeypatch.setattr(session_table, "_HOLD_SECONDS", 0.01)
  config = server.GatewayConfig(journal=str(tmp_path))
  with scripted.serve([], config=config) as gateway:
    admin = {"Authorization": f"Bearer {gateway.admin_token}"}
    url = f"{gateway.url}/admin/sessions"
    with client.open_session(gateway.url, gateway.admin_token, "s"):
      assert httpx.get(f"{url}/s", headers=admin).status_code == 200
    while httpx.get(f"{url}/s", headers=admin).status_code != 404:
      pass
  with scripted.serve([], config=config) as gateway:
    admin = {"Authorization": f"Bearer {gateway.admin_token}"}
    reply = httpx.get(f"{gateway.url}/admin/sessions/s", headers=admin)
    assert reply.status_code == 404


def test_two_gateways_share_no_journal(tmp_path):
  config = server.GatewayConfig(journal=str(tmp_path))
  with (
    scripted.serve([], config=config),
    pytest.raises(errors.ConfigError, match="a gateway that is running"),
  ):
    scripted.serve([], config=config).__enter__()
  with scripted.serve([], config=config):
    pass


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_disk_is_a_503_as_long_as_it_is_full(
  tmp_path, monkeypatch, stream
):
  monkeypatch.setattr(journal, "_FIRST_PAUSE", 0.01)
  config = server.GatewayConfig(journal=str(tmp_path))
  with scripted.serve(["one", "two"], config=config) as gateway:
    with client.open_session(gateway.url, gateway.admin_token, "s") as session:

      def ask():
        return httpx.post(
          f"{session.base_url}/chat/completions",
          json={"model": "m", "messages": [user("?")], "stream": stream},
          headers={"Authorization": f"Bearer {session.api_key}"},
        )

      def full(_):
        raise OSError(28, "No space left on device")

      with monkeypatch.context() as patch:
        patch.setattr(segment.os, "fdatasync", full)
        reply = ask()
        assert "No space left" in reply.text and "[DONE]" not in reply.text
        assert reply.status_code == (200 if stream else 503)
        reply = ask()  # is turned away before anything is sampled
        assert reply.status_code == 503 and "retry-after" in reply.headers
        with pytest.raises(errors.GatewayError, match="No space left"):
          client.open_session(gateway.url, gateway.admin_token, "t").__enter__()
      while (reply := ask()).status_code == 503:
        time.sleep(0.01)
      assert reply.status_code == 200 and "two" in reply.text
    first, second = session.completions
    assert second.request.retry_of == first.id
    with client.open_session(gateway.url, gateway.admin_token, "t"):
      pass


def test_a_session_that_was_left_behind_is_closed(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(session_table, "_HOLD_SECONDS", 0.01)
  config = server.GatewayConfig(
    admin_token="admin", journal=str(tmp_path), idle_seconds=2.0
  )

  def asked(gateway, path, key, body=None):
    return httpx.request(
      "POST" if body else "GET",
      gateway.url + path,
      json=body,
      headers={"Authorization": f"Bearer {key}"},
      timeout=30,
    )

  def found(gateway):
    paths = (f"/admin/sessions/{id}" for id in ("left", "used"))
    return [asked(gateway, path, "admin").status_code for path in paths]

  with scripted.serve(["a"] * 1000, config=config) as gateway:
    for id in ("left", "used"):
      opened = asked(gateway, "/admin/sessions", "admin", {"id": id}).json()
    deadline = time.monotonic() + 60
    while "'left' is closed, with 0" not in caplog.text:
      assert time.monotonic() < deadline
      body = {"model": "m", "messages": [user("?")]}
      path, key = "/v1/chat/completions", opened["api_key"]
      assert asked(gateway, path, key, body).is_success
      time.sleep(0.05)
    while found(gateway) != [404, 200]:
      assert time.monotonic() < deadline
  with scripted.serve([], config=config) as gateway:
    assert found(gateway) == [404, 200]


def test_a_reward_counts_once_though_the_disk_was_full(tmp_path, monkeypatch):
  monkeypatch.setattr(journal, "_FIRST_PAUSE", 0.01)
  real, failures = segment.os.fdatasync, iter(range(3))

  def full(descriptor):
    if next(failures, None) is not None:
      raise OSError(28, "No space left on device")
    real(descriptor)

  config = server.GatewayConfig(journal=str(tmp_path))
  with scripted.serve([], config=config) as gateway:
    with client.open_session(gateway.url, gateway.admin_token, "s") as session:
      monkeypatch.setattr(segment.os, "fdatasync", full)
      session.reward("solved", 1.0)
      assert next(failures, None) is None  # it was not taken at first
      session.reward("solved", 1.0)  # another one
    assert [reward.value for reward in session.rewards] == [1.0, 1.0]


def test_a_reward_posted_again_under_its_key_counts_once(restarting):
  each = restarting("once", [])
  keys = each.open("s")

  def post(value, key):
    return httpx.post(
      f"{each.gateway.url}/sessions/s/reward",
      json={"rewards": [{"name": "r", "value": value}]},
      headers={
        "Authorization": f"Bearer {keys['control_key']}",
        "Idempotency-Key": key,
      },
    )

  assert [post(0.5, key).json()["rewards"] for key in "aab"] == [1, 1, 2]
  each.restart()
  assert post(0.5, "a").json()["rewards"] == 2
  other = post(0.7, "a")
  assert other.status_code == 422 and "other rewards" in other.text
  assert [r["value"] for r in each.ended("s", keys)["rewards"]] == [0.5, 0.5]


def test_what_was_lost_and_what_is_the_main_conversation_come_back():
  class Empty:
    def render(self, messages, tools):
      return addition.Addition.of([1])

  opening = records.opening("s", 0, {}, (b"", b""))
  left, session = [], sessions.Session("s", 0, {})
  session.log = left.append

  def ask(session, system, arrives=True):
    caller = attempts.read("/messages", "m", system.encode(), {})
    attempt = session.attempts.begin(caller)
    messages = [{"role": "system", "content": system}, user("?")]
    plan = session.begin(Empty(), messages, (), attempt=attempt)
    session.record(
      plan,
      response_ids=[1],
      logprobs=[-1.0],
      versions=[0],
      stop_reason=types.StopReason.STOP,
      reply=says("!"),
    )
    session.end(attempt, arrives)
    return plan.request.kind.value

  assert ask(session, "You are the agent.") == "main"
  assert ask(session, "You search.", arrives=False) == "sub-agent"
  back = replay.Replay(opening)
  for record in left:
    back.apply(record)
  assert [c.delivered for c in back.session.completions()] == [True, False]
  assert ask(back.session, "You are the agent.") == "main"
  assert ask(back.session, "You search.") == "sub-agent"
