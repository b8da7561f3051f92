"""Whatever comes in, the gateway answers 2xx or 4xx and lives on.

With --full, 12000 requests are drawn from the grammar and 1000 from the types of
the official clients, instead of the few that every run of the tests draws.
"""

import collections
import contextlib
import http.client
import pathlib
import random
import re
import socket

from anthropic.types.beta import (
  message_count_tokens_params,
  message_create_params,
)
import hypothesis
from malformed import Grammar
from openai.types import completion_create_params as legacy
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params
import pydantic
import pytest
import requests
import schemathesis

from forge_jax import client
from forge_jax.gateway import scripted, server

_SESSION_LENGTH = 250  # requests; a session keeps what it has answered
_TYPES = {
  "/v1/chat/completions": chat.CompletionCreateParamsNonStreaming,
  "/v1/completions": legacy.CompletionCreateParamsNonStreaming,
  "/v1/responses": response_create_params.ResponseCreateParamsNonStreaming,
  "/v1/messages": message_create_params.MessageCreateParamsNonStreaming,
  "/v1/messages/count_tokens": (
    message_count_tokens_params.MessageCountTokensParams
  ),
}


@pytest.fixture
def gateway():
  """One whose model samples anything at all, markup included."""
  rng = random.Random(0)
  tokenizer = scripted.byte_tokenizer()

  def babble(request):
    return rng.choices(range(len(tokenizer)), k=rng.randrange(1, 12))

  config = server.GatewayConfig(max_body_bytes=2**20)
  with scripted.serve(babble, tokenizer=tokenizer, config=config) as served:
    yield served


class Wire:
  """A connection that is opened again whenever it was closed."""

  def __init__(self, url):
    self._address = url.removeprefix("http://")
    self._http = None

  def send(self, request):
    """The status of the answer."""
    if self._http is None:
      self._http = http.client.HTTPConnection(self._address, timeout=30)
    try:
      self._http.request(
        request.method, request.path, request.body, request.headers
      )
      response = self._http.getresponse()
      response.read()
    except (http.client.BadStatusLine, ConnectionError):
      # It was closed after the last answer, or before all was sent.
      self._http.close()
      self._http = None
      return None
    if response.will_close:
      self._http.close()
      self._http = None
    return response.status


def memory():
  """Resident bytes of this process, the gateway's too."""
  text = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024


def test_a_grammar_of_malformed_requests(gateway, full):
  count = 12_000 if full else 1000
  wire = Wire(gateway.url)
  statuses, before = collections.Counter(), 0
  for first in range(0, count, _SESSION_LENGTH):
    with client.open_session(
      gateway.url, gateway.admin_token, f"s{first}"
    ) as session:
      grammar = Grammar(first, session.id, session.api_key, gateway.admin_token)
      for _ in range(min(_SESSION_LENGTH, count - first)):
        drawn = grammar.draw()
        status = wire.send(drawn)
        statuses[status] += 1
        assert status is None or status // 100 in (2, 4), (status, drawn)
      close(gateway, "fuzz")
    gateway.requests.clear()
    if first <= count // 4:
      before = memory()
  print(dict(statuses), memory() - before)
  assert statuses[None] < count / 20
  assert statuses[200] > count / 20
  assert requests.get(f"{gateway.url}/health").json() == {"status": "ok"}
  assert memory() - before < 32 * 2**20


def close(gateway, id):
  """Closes a session that a drawn request may have opened."""
  with contextlib.suppress(requests.RequestException):
    requests.post(
      f"{gateway.url}/sessions/{id}/close",
      headers={"Authorization": f"Bearer {gateway.admin_token}"},
    )


def openapi():
  """What the official clients may send, as an OpenAPI description."""
  components, paths = {}, {}
  for number, (path, kind) in enumerate(_TYPES.items()):
    reference = f"#/components/schemas/{number}_{{model}}"
    schema = pydantic.TypeAdapter(kind).json_schema(ref_template=reference)
    for name, inner in schema.pop("$defs", {}).items():
      components[f"{number}_{name}"] = inner
    body = {"content": {"application/json": {"schema": schema}}}
    answers = {"default": {"description": "any"}}
    paths[path] = {
      "post": {"requestBody": {**body, "required": True}, "responses": answers}
    }
  return {
    "openapi": "3.1.0",
    "info": {"title": "gateway", "version": "1"},
    "paths": paths,
    "components": {"schemas": components},
  }


@pytest.mark.parametrize("path", _TYPES)
def test_what_the_clients_types_allow(gateway, full, path):
  operation = schemathesis.openapi.from_dict(openapi())[path]["POST"]
  with (
    client.open_session(gateway.url, gateway.admin_token, "s") as session,
    requests.Session() as http,
  ):
    headers = {"Authorization": f"Bearer {session.api_key}"}

    @hypothesis.settings(
      max_examples=200 if full else 12,
      database=None,
      derandomize=True,
      suppress_health_check=list(hypothesis.HealthCheck),
      phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy())
    def check(case):
      answer = case.call(base_url=gateway.url, headers=headers, session=http)
      assert answer.status_code // 100 in (2, 4), answer.text

    check()
  assert requests.get(f"{gateway.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
  "sent",
  [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client's hello
    b"GARBAGE\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: g\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: g\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: g\r\n\r\n",
    b"POST /v1/messages HTTP/1.1\r\nHost: g\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/messages HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"POST /v1/messages HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n{}",
    b"POST /v1/messages HTTP/1.1\r\nHost: g\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
  ],
)
def test_what_is_no_http(gateway, sent):
  host, port = gateway.url.removeprefix("http://").split(":")
  with (
    socket.create_connection((host, int(port)), timeout=10) as connection,
    contextlib.suppress(ConnectionError),
  ):
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    answer = connection.recv(65536)
    assert answer == b"" or answer.startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
  assert requests.get(f"{gateway.url}/health").json() == {"status": "ok"}
