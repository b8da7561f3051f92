"""Sandboxes that are containers: of Docker, Podman or a Kubernetes cluster.

The same guest runs in them, as process 1 and as a user without rights, and
talks through the engine's client program. What holds it is the engine's: see
docs/how-to/sandbox.md for what is asked of it. All of the guest comes in its
command, so that any image with Python 3.12 or newer will do.
"""

import asyncio
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
from typing import Any
import urllib.parse

from forge_jax import errors
from forge_jax.agents.sandbox import base, box, relay, seccomp

# Their clients' programs.
ENGINES = {"docker": "docker", "podman": "podman", "kubernetes": "kubectl"}
_HOME = "/home/agent"
_WORK = f"{_HOME}/work"
_USER = 1000
_MOST_SECONDS = 86_400  # that a pod lives, should nobody end it
_numbers = itertools.count()  # of containers, unique within a process


@dataclasses.dataclass(frozen=True, slots=True)
class ContainerConfig:
  """Where sandboxes are made, and of what."""

  image: str  # has Python 3.12 or newer, and what programs shall find
  engine: str = "docker"  # or "podman", "kubernetes"
  python: str = "python3"  # in the image
  namespace: str = "default"  # of Kubernetes
  show: tuple[str, ...] = ()  # this machine's paths, read-only at their own
  arguments: tuple[str, ...] = ()  # further ones of the client's `run`

  def __post_init__(self):
    if self.engine not in ENGINES:
      raise errors.ConfigError(
        f"container engine is {self.engine!r}; expected one of "
        f"{', '.join(ENGINES)}"
      )
    if self.show and self.engine == "kubernetes":
      raise errors.ConfigError(
        f"a pod cannot show {', '.join(self.show)}: put it into the image"
      )


class Containers:
  """Opens containers; used from one asyncio loop."""

  def __init__(self, config: ContainerConfig):
    """Looks for the engine's client.

    Raises:
      SandboxError: it is not installed.
    """
    self._config = config
    name = ENGINES[config.engine]
    program = shutil.which(name)
    if program is None:
      raise errors.SandboxError(
        f"{config.engine}: its client {name} is not installed, or not in PATH"
      )
    self._program = program

  async def open(
    self, limits: base.Limits | None = None, *, gateway: str | None = None
  ) -> box.Box:
    """Opens a container; see `base.Backend`.

    Raises:
      SandboxError: the engine cannot be reached or refuses; the message has its
        words.
      ConfigError: the gateway's origin is none.
    """
    limits = limits or base.Limits()
    name = f"forge-sandbox-{os.getpid()}-{next(_numbers)}"
    async with contextlib.AsyncExitStack() as undo:
      if self._config.engine == "kubernetes":
        command, way_out = await self._prepare_pod(name, limits, gateway, undo)
      else:
        command, way_out = await self._prepare(name, limits, gateway, undo)
      process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
      )
      opened = box.Box(
        process,
        work=_WORK,
        home=_HOME,
        gateway=way_out,
        limits=limits,
        on_close=(undo.pop_all().aclose,),
      )
    return await box.open_box(opened)

  async def _prepare(
    self,
    name: str,
    limits: base.Limits,
    gateway: str | None,
    undo: contextlib.AsyncExitStack,
  ) -> tuple[list[str], str | None]:
    """The command of a local container, and its way out as seen inside."""
    mounts, way_out = [f"--volume={p}:{p}:ro" for p in self._config.show], None
    if gateway is not None:
      folder = box.make_folder("forge-sandbox")
      undo.callback(shutil.rmtree, folder, ignore_errors=True)
      os.chmod(folder, 0o711)
      path = os.path.join(folder, "gateway.sock")
      way = relay.Relay(gateway)
      undo.push_async_callback(way.aclose)
      await way.start(path)
      mounts.append(f"--volume={path}:{box.GATEWAY_SOCKET}")
      way_out = f"http://127.0.0.1:{box.GATEWAY_PORT}"
    undo.push_async_callback(self._call, "rm", "--force", name)
    return [
      *(self._program, "run", "--rm", "--interactive", "--name", name),
      *("--network", "none", "--hostname", "sandbox", "--read-only"),
      *("--user", f"{_USER}:{_USER}", "--cap-drop", "ALL"),
      *("--security-opt", "no-new-privileges", "--log-driver", "none"),
      *("--memory", str(limits.memory_bytes)),
      *("--memory-swap", str(limits.memory_bytes)),
      *("--pids-limit", str(limits.processes), "--cpus", str(limits.cpus)),
      *_tmpfs(limits),
      *mounts,
      *self._config.arguments,
      self._config.image,
      *self._guest(limits, gateway is not None),
    ], way_out

  async def _prepare_pod(
    self,
    name: str,
    limits: base.Limits,
    gateway: str | None,
    undo: contextlib.AsyncExitStack,
  ) -> tuple[list[str], str | None]:
    """The command of a pod, and its way out as seen inside."""
    egress, way_out = [], None
    if gateway is not None:
      way_out, address, port = await _resolve(gateway)
      egress = [
        {
          "to": [{"ipBlock": {"cidr": address}}],
          "ports": [{"protocol": "TCP", "port": port}],
        }
      ]
    policy = {
      "apiVersion": "networking.k8s.io/v1",
      "kind": "NetworkPolicy",
      "metadata": {"name": name},
      "spec": {
        "podSelector": {"matchLabels": {"run": name}},
        "policyTypes": ["Ingress", "Egress"],
        "egress": egress,
      },
    }
    for kind in ("networkpolicy", "pod"):
      undo.push_async_callback(
        self._kubectl, "delete", kind, name, "--now", "--ignore-not-found"
      )
    failure = await self._kubectl("apply", "--filename=-", given=policy)
    if failure:
      raise errors.SandboxError(f"kubernetes: {failure}")
    pod = _pod(
      name,
      self._config.image,
      self._guest(limits, has_gateway=False),
      limits,
    )
    return [
      *(self._program, "--namespace", self._config.namespace),
      *("run", name, "--image", self._config.image, "--restart=Never"),
      *("--rm", "--stdin", "--quiet", f"--overrides={json.dumps(pod)}"),
      *self._config.arguments,
    ], way_out

  def _guest(self, limits: base.Limits, has_gateway: bool) -> list[str]:
    """The command inside."""
    forward = {"port": box.GATEWAY_PORT, "path": box.GATEWAY_SOCKET}
    config = box.GuestConfig(
      work=_WORK,
      env={
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": _HOME,
        "USER": "agent",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
      },
      output_bytes=limits.output_bytes,
      rlimits=limits.of_each_process(),
      watch_memory=0,
      forward=forward if has_gateway else None,
      seccomp=seccomp.program().hex(),
    )
    return [self._config.python, "-ISB", "-c", _program(), config.to_json()]

  async def _kubectl(
    self, *words: str, given: Mapping[str, Any] | None = None
  ) -> str:
    namespace = ("--namespace", self._config.namespace)
    return await self._call(*namespace, *words, given=given)

  async def _call(
    self, *words: str, given: Mapping[str, Any] | None = None
  ) -> str:
    """Runs the client; what it says if that fails, else nothing."""
    process = await asyncio.create_subprocess_exec(
      self._program,
      *words,
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    text = json.dumps(given).encode() if given is not None else None
    _, said = await process.communicate(text)
    if not process.returncode:
      return ""
    return said.decode(errors="replace").strip() or "it failed"


@functools.cache
def _program() -> str:
  """The guest as one text, with what it imports of ours in front."""
  here = pathlib.Path(__file__).parent
  parts = ["import os, sys, types", f"os.makedirs({_WORK!r}, exist_ok=True)"]
  for name in ("forward", "processes"):
    source = (here / f"{name}.py").read_text("utf-8")
    parts += [
      f"sys.modules[{name!r}] = types.ModuleType({name!r})",
      f"exec({source!r}, sys.modules[{name!r}].__dict__)",
    ]
  guest = (here / "guest.py").read_text("utf-8")
  return "\n".join([*parts, f"exec({guest!r})"])


def _tmpfs(limits: base.Limits) -> Sequence[str]:
  """What can be written to; together it is limited as memory."""
  size = f"rw,nosuid,nodev,size={limits.disk_bytes}"
  return [
    *("--tmpfs", f"{_HOME}:{size},mode=0777"),
    *("--tmpfs", f"/tmp:{size},mode=1777"),
    *("--shm-size", str(limits.disk_bytes)),
  ]


def _pod(
  name: str, image: str, command: Sequence[str], limits: base.Limits
) -> dict[str, Any]:
  """A pod of one container, with no rights and no identity in the cluster."""
  folders = {"home": _HOME, "tmp": "/tmp"}
  container = {
    "name": name,
    "image": image,
    "command": list(command),
    "stdin": True,
    "stdinOnce": True,
    "resources": {
      "limits": {
        "memory": str(limits.memory_bytes),
        "cpu": str(limits.cpus),
      }
    },
    "securityContext": {
      "runAsUser": _USER,
      "runAsGroup": _USER,
      "runAsNonRoot": True,
      "allowPrivilegeEscalation": False,
      "readOnlyRootFilesystem": True,
      "capabilities": {"drop": ["ALL"]},
      "seccompProfile": {"type": "RuntimeDefault"},
    },
    "volumeMounts": [
      {"name": volume, "mountPath": path} for volume, path in folders.items()
    ],
  }
  memory = {"medium": "Memory", "sizeLimit": str(limits.disk_bytes)}
  return {
    "apiVersion": "v1",
    "spec": {
      "containers": [container],
      "volumes": [{"name": v, "emptyDir": memory} for v in folders],
      "restartPolicy": "Never",
      "activeDeadlineSeconds": _MOST_SECONDS,
      "automountServiceAccountToken": False,
      "enableServiceLinks": False,
      "hostname": "sandbox",
    },
  }


async def _resolve(gateway: str) -> tuple[str, str, int]:
  """An origin by address, for pods ask no name server: with block and port."""
  parts = urllib.parse.urlsplit(gateway)
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise errors.ConfigError(
      f"the gateway is {gateway!r}; expected http://host:port or https://..."
    )
  port = parts.port or (443 if parts.scheme == "https" else 80)
  found = await asyncio.get_running_loop().getaddrinfo(
    parts.hostname, port, family=socket.AF_INET, type=socket.SOCK_STREAM
  )
  address = found[0][4][0]
  return f"{parts.scheme}://{address}:{port}", f"{address}/32", port
