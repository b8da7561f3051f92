"""The way out of a sandbox, and that it leads to one place."""

import asyncio
import contextlib

import pytest

from forge_jax import errors
from forge_jax.agents.sandbox import relay


@contextlib.asynccontextmanager
async def echoing():
  """A server that says back in capitals what it hears; yields its port."""

  async def serve(reader, writer):
    while data := await reader.read(1000):
      writer.write(data.upper())
      await writer.drain()
    writer.close()

  server = await asyncio.start_server(serve, "127.0.0.1", 0)
  async with server:
    yield server.sockets[0].getsockname()[1]


CLIENT = """
import socket, sys
s = socket.create_connection(("127.0.0.1", 8114))
for _ in range(200):
  s.sendall(b"a" * 10000)
  got = b""
  while len(got) < 10000: got += s.recv(65536)
s.shutdown(socket.SHUT_WR)
print(got == b"A" * 10000, s.recv(1))
"""


async def test_a_program_talks_to_the_gateway(open_box):
  async with echoing() as port:
    box = await open_box(gateway=f"http://127.0.0.1:{port}")
    assert box.gateway == "http://127.0.0.1:8114"
    for _ in range(2):  # each command has a way of its own
      result = await box.run(["python3", "-c", CLIENT], seconds=30)
      assert (result.stdout, result.stderr) == (b"True b''\n", b"")


async def test_without_a_gateway_there_is_no_way(open_box):
  box = await open_box()
  assert box.gateway is None
  result = await box.run(["python3", "-c", CLIENT], seconds=30)
  assert b"Connection refused" in result.stderr


async def test_a_gateway_that_is_gone_is_a_closed_connection(open_box):
  async with echoing() as port:
    pass
  box = await open_box(gateway=f"http://127.0.0.1:{port}")
  code = CLIENT.replace("for _", "print(s.recv(1)); sys.exit()\nfor _")
  result = await box.run(["python3", "-c", code], seconds=30)
  assert result.stdout == b"b''\n" or b"reset" in result.stderr


async def test_connections_are_few(tmp_path):
  async with echoing() as port:
    way = relay.Relay(f"http://127.0.0.1:{port}")
    path = str(tmp_path / "s")
    await way.start(path)
    ends = [await asyncio.open_unix_connection(path) for _ in range(70)]
    answered = 0
    for reader, writer in ends:
      with contextlib.suppress(OSError):
        writer.write(b"x")
        answered += await reader.read(1) == b"X"
      writer.close()
    assert answered == 64
    await way.aclose()


@pytest.mark.parametrize("origin", ["", "127.0.0.1:80", "ftp://a", "http://"])
def test_an_origin_is_an_address(origin):
  with pytest.raises(errors.ConfigError, match="expected http://host:port"):
    relay.Relay(origin)
