"""Trains your agent: a session of a running gateway, from any process.

  with client.open_session(url, admin_token, "task-17") as session:
    done = subprocess.run(
      ["my-agent", "fix the bug"], env=os.environ | session.env()
    )
    session.reward("solved", float(done.returncode == 0))

The agent is a child that is told, by environment variables, where its model is.
Leaving the block closes the session; what was captured is in `completions`.
"""

from collections.abc import Iterator, Mapping
import contextlib
import ssl
import time
from typing import Any
import urllib.parse
import uuid

import httpx

from forge_jax import errors, types
from forge_jax.gateway import wire

_TIMEOUT = 60.0  # seconds; closing waits for what is in flight to be aborted
_PATIENCE = 60.0  # seconds in which a reward is posted again


class Session:
  """An open session; used from one thread."""

  def __init__(self, http: httpx.Client, id: str, opened: Mapping[str, str]):
    """Wraps the gateway's answer; see `open_session`."""
    self._http = http
    self.id = id
    self.api_key = opened["api_key"]  # the agent's
    self.control_key = opened["control_key"]  # the scorer's
    self.base_url = f"{str(http.base_url).rstrip('/')}/v1"
    self.completions: tuple[types.Completion, ...] = ()  # once closed
    self.rewards: tuple[types.Reward, ...] = ()  # once closed
    self._closed = False

  def env(self) -> dict[str, str]:
    """Environment variables that point OpenAI's and Anthropic's clients here."""
    return {
      "OPENAI_API_KEY": self.api_key,
      "OPENAI_BASE_URL": self.base_url,
      "ANTHROPIC_API_KEY": self.api_key,
      "ANTHROPIC_BASE_URL": self.base_url.removesuffix("/v1"),
    }

  def reward(
    self,
    name: str,
    value: float,
    *,
    process: bool = False,
    step: int | None = None,
  ) -> None:
    """Adds a reward, once.

    While the gateway cannot be reached or cannot keep it (503), the reward is
    posted again, for a minute; under one key, so that it counts once even if
    only the answer was lost.

    Args:
      name: what it is for.
      value: finite.
      process: whether it is about behaviour on the way, not the outcome.
      step: number of the completion it belongs to; None: the last one.

    Raises:
      GatewayError: the gateway is unreachable or refuses.
    """
    component = types.Component.PROCESS if process else types.Component.PERF
    reward = types.Reward(name, component, value, step)
    body, once = {"rewards": [wire.reward_to_json(reward)]}, uuid.uuid4().hex
    give_up = time.monotonic() + _PATIENCE
    while True:
      try:
        self._post("reward", body, once)
        return
      except _TryAgainError as error:
        if time.monotonic() + error.seconds > give_up:
          raise
        time.sleep(error.seconds)

  def close(self) -> None:
    """Closes the session and fetches what it holds; may be called again.

    Requests in flight are aborted; what they had sampled is kept.

    Raises:
      GatewayError: the gateway is unreachable or refuses.
    """
    if self._closed:
      return
    held = self._post("close", {})
    self._closed = True
    self.completions = wire.completions_from_json(held["completions"])
    self.rewards = tuple(wire.reward_from_json(r) for r in held["rewards"])

  def _post(
    self, what: str, body: Mapping[str, Any], once: str | None = None
  ) -> Mapping[str, Any]:
    path = f"/sessions/{urllib.parse.quote(self.id, safe='')}/{what}"
    return _post(self._http, path, self.control_key, body, once)


@contextlib.contextmanager
def open_session(
  url: str,
  admin_token: str,
  id: str,
  *,
  seed: int = 0,
  sampling: Mapping[str, float] | None = None,
  ca_file: str | None = None,
) -> Iterator[Session]:
  """Opens a session for the length of a block.

  Args:
    url: of the gateway, such as http://127.0.0.1:8080.
    admin_token: the gateway's.
    id: the session's name, unique among the open ones.
    seed: of everything sampled in it, 0 <= seed < 2**31.
    sampling: values of temperature, top_p, top_k and min_p for requests that set
      none.
    ca_file: PEM file of the authority behind the gateway's certificate.

  Yields:
    The session.

  Raises:
    GatewayError: the gateway is unreachable or refuses.
  """
  body = {"id": id, "seed": seed, "sampling": dict(sampling or {})}
  verify = ssl.create_default_context(cafile=ca_file)
  with httpx.Client(base_url=url, timeout=_TIMEOUT, verify=verify) as http:
    opened = _post(http, "/admin/sessions", admin_token, body)
    session = Session(http, id, opened)
    try:
      yield session
    finally:
      session.close()


class _TryAgainError(errors.GatewayError):
  """The same request may succeed after some seconds."""

  def __init__(self, message: str, seconds: float):
    super().__init__(message)
    self.seconds = seconds


def _post(
  http: httpx.Client,
  path: str,
  key: str,
  body: Mapping[str, Any],
  once: str | None = None,
) -> Mapping[str, Any]:
  where = f"POST {str(http.base_url).rstrip('/')}{path}"
  headers = {"Authorization": f"Bearer {key}"}
  if once is not None:
    headers["Idempotency-Key"] = once
  try:
    response = http.post(path, json=body, headers=headers)
    reply = response.json()
  except httpx.TransportError as error:
    message = f"{where}: {type(error).__name__}: {error}"
    raise _TryAgainError(message, 1.0) from error
  except (httpx.HTTPError, ValueError) as error:
    raise errors.GatewayError(
      f"{where}: {type(error).__name__}: {error}"
    ) from error
  if response.is_error:
    told = reply.get("error", {}).get("message", reply)
    message = f"{where}: {response.status_code}: {told}"
    if response.status_code == 503:
      seconds = float(response.headers.get("Retry-After", 1.0))
      raise _TryAgainError(message, seconds)
    raise errors.GatewayError(message)
  return reply
