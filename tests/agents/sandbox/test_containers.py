"""Containers as sandboxes: what is asked of the engine, and one that runs.

  SANDBOX_ENGINE=docker SANDBOX_IMAGE=python:3.12-slim \\
    python -m pytest tests/agents/sandbox -k container
"""

import asyncio
import json
import stat

import pytest

from forge_jax import errors
from forge_jax.agents.sandbox import backends, base, containers

LIMITS = base.Limits(
  memory_bytes=256 * base.MIB, processes=32, disk_bytes=32 * base.MIB
)


@pytest.fixture
def client(tmp_path, monkeypatch):
  """A client program that keeps what it is asked, and refuses."""

  def install(name, script):
    path = tmp_path / name
    log = f'printf "%s\\n" "$@" END >>{tmp_path}/asked\n'
    path.write_text(f"#!/bin/sh\n{log}{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

  def asked():
    text = (tmp_path / "asked").read_text()
    return [part.splitlines() for part in text.split("END\n")[:-1]]

  install.asked = asked
  return install


async def test_an_engine_that_cannot_be_reached_is_told(client):
  client("docker", 'echo "no daemon is running" >&2; exit 1')
  config = backends.SandboxConfig("docker", "an-image", show=("/opt/agents",))
  backend = backends.make(config)
  with pytest.raises(errors.SandboxError, match="no daemon is running"):
    await backend.open(LIMITS, gateway="http://127.0.0.1:9")
  run, remove = client.asked()
  assert run[:3] == ["run", "--rm", "--interactive"]
  for words in (
    ["--network", "none"],
    ["--cap-drop", "ALL"],
    ["--user", "1000:1000"],
    ["--memory", str(256 * base.MIB)],
    ["--pids-limit", "32"],
    ["--security-opt", "no-new-privileges"],
  ):
    place = run.index(words[0])
    assert run[place : place + 2] == words
  assert "--read-only" in run and "an-image" in run
  (mount,) = (w for w in run if w.endswith(":/run/gateway.sock"))
  assert mount.split(":")[0].endswith("/gateway.sock")
  assert "--volume=/opt/agents:/opt/agents:ro" in run
  assert remove == ["rm", "--force", run[run.index("--name") + 1]]


async def test_a_pod_has_no_rights_and_one_way_out(client):
  client("kubectl", 'case "$*" in *apply*) cat >&2;; esac; exit 1')
  config = containers.ContainerConfig("an-image", engine="kubernetes")
  backend = containers.Containers(config)
  with pytest.raises(errors.SandboxError) as caught:
    await backend.open(LIMITS, gateway="http://localhost:8080")
  policy = json.loads(str(caught.value).removeprefix("kubernetes: "))
  (rule,) = policy["spec"]["egress"]
  assert rule["to"] == [{"ipBlock": {"cidr": "127.0.0.1/32"}}]
  assert rule["ports"] == [{"protocol": "TCP", "port": 8080}]
  assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
  asked = [words[2:4] for words in client.asked()]
  assert asked == [
    ["apply", "--filename=-"],
    ["delete", "pod"],
    ["delete", "networkpolicy"],
  ]
  pod = containers._pod("n", "an-image", ["python3"], LIMITS)["spec"]
  (container,) = pod["containers"]
  assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
  assert container["securityContext"]["runAsNonRoot"]
  assert not pod["automountServiceAccountToken"]
  with pytest.raises(errors.ConfigError, match="the gateway is 'nowhere'"):
    await backend.open(LIMITS, gateway="nowhere")


def test_what_is_not_there_is_told(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  for engine, program in containers.ENGINES.items():
    config = containers.ContainerConfig("image", engine=engine)
    with pytest.raises(errors.SandboxError, match=f"its client {program} is"):
      containers.Containers(config)
  with pytest.raises(errors.ConfigError, match="'lxc'; expected one of docker"):
    containers.ContainerConfig("image", engine="lxc")
  with pytest.raises(errors.ConfigError, match="a pod cannot show /opt"):
    containers.ContainerConfig("image", engine="kubernetes", show=("/opt",))
  with pytest.raises(errors.ConfigError, match="'lxc'; expected one of bubble"):
    backends.SandboxConfig("lxc")
  for given in (("docker", ""), ("bubblewrap", "an-image")):
    with pytest.raises(errors.ConfigError, match="expected an image for"):
      backends.SandboxConfig(*given)


async def test_a_container_gets_and_gives(open_container):
  box = await open_container(LIMITS)
  await box.put({"in/a.txt": b"one\n"})
  script = "cat in/a.txt -; echo two >out.txt; id -u; exit 3"
  result = await box.run(["sh", "-c", script], seconds=20, stdin=b"\x00\xff")
  assert (result.code, result.stdout) == (3, b"one\n\x00\xff1000\n")
  assert await box.get() == {"in/a.txt": b"one\n", "out.txt": b"two\n"}
  late = await box.run(["sleep", "60"], seconds=0.5)
  assert late.timed_out
  code = "b = [bytearray(2**20) for _ in range(2**10)]"
  full = await box.run(["python3", "-c", code], seconds=60)
  assert full.failure is not None


async def test_a_container_reaches_its_gateway(open_container):
  async def answer(reader, writer):
    writer.write(await reader.readline())
    writer.close()

  server = await asyncio.start_server(answer, "127.0.0.1", 0)
  port = server.sockets[0].getsockname()[1]
  async with server:
    box = await open_container(LIMITS, gateway=f"http://127.0.0.1:{port}")
    code = (
      "import socket, sys; s = socket.create_connection(('127.0.0.1',"
      " int(sys.argv[1]))); s.send(b'hello\\n'); print(s.recv(9))"
    )
    inside = box.gateway.rpartition(":")[2]
    result = await box.run(["python3", "-c", code, inside], seconds=20)
    assert result.stdout == b"b'hello\\n'\n", result
    await box.aclose()
