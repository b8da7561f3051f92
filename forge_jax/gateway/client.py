"""A client of the gateway: what opens, scores and closes sessions."""

from collections.abc import Mapping
import dataclasses
import ssl
from typing import Any
import urllib.parse

import aiohttp

from forge_jax import errors, types
from forge_jax.gateway import wire


@dataclasses.dataclass(frozen=True, slots=True)
class SessionKeys:
  """What an agent needs to reach its session."""

  api_key: str = dataclasses.field(repr=False)
  base_url: str  # ends in "/v1"
  # What a scorer needs: it rewards and closes the session.
  control_key: str = dataclasses.field(repr=False)


class GatewayClient:
  """Opens, scores and closes sessions; used from one asyncio loop."""

  def __init__(self, url: str, admin_token: str, *, ca_file: str | None = None):
    """Connects lazily.

    Args:
      url: of the gateway, such as http://127.0.0.1:8080.
      admin_token: the gateway's.
      ca_file: PEM file of the authority behind the gateway's certificate.
    """
    self._url = url.rstrip("/")
    self._token = admin_token
    self._ca_file = ca_file
    self._http: aiohttp.ClientSession | None = None

  async def open_session(
    self, id: str, *, seed: int, sampling: Mapping[str, float] | None = None
  ) -> SessionKeys:
    """Opens a session, named uniquely among the gateway's open ones.

    Args:
      id: the session's name, usually the episode's.
      seed: of everything sampled in the session, 0 <= seed < 2**31.
      sampling: values of temperature, top_p, top_k, min_p for requests that set
        none themselves.

    Raises:
      GatewayError: the gateway is unreachable or refuses.
    """
    body = {"id": id, "seed": seed, "sampling": dict(sampling or {})}
    reply = await self._call("POST", "/admin/sessions", body)
    return SessionKeys(
      reply["api_key"], f"{self._url}/v1", reply["control_key"]
    )

  async def close_session(
    self, id: str
  ) -> tuple[tuple[types.Completion, ...], tuple[types.Reward, ...]]:
    """Closes a session; returns what was captured, in request order.

    Requests in flight are aborted; what they had sampled is kept.

    Raises:
      GatewayError: the gateway is unreachable or knows no such session.
    """
    reply = await self._call("POST", f"/sessions/{_quoted(id)}/close", {})
    return (
      wire.completions_from_json(reply["completions"]),
      tuple(wire.reward_from_json(r) for r in reply["rewards"]),
    )

  def reward_url(self, id: str) -> str:
    """Where rewards of a session are posted, with its control key."""
    return f"{self._url}/sessions/{_quoted(id)}/reward"

  async def post_reward(self, id: str, reward: types.Reward) -> None:
    """Adds a reward to an open session.

    Raises:
      GatewayError: the gateway is unreachable or knows no such session.
    """
    body = {"rewards": [wire.reward_to_json(reward)]}
    await self._call("POST", f"/sessions/{_quoted(id)}/reward", body)

  async def forest(self, id: str) -> Mapping[str, Any]:
    """The forest captured so far, as the gateway's JSON.

    Raises:
      GatewayError: the gateway is unreachable or knows no such session.
    """
    return await self._call("GET", f"/admin/sessions/{_quoted(id)}/forest")

  async def aclose(self) -> None:
    """Closes the connections; the client may be used again."""
    if self._http is not None:
      await self._http.close()
      self._http = None

  def _trust(self) -> ssl.SSLContext | bool:
    if self._ca_file is None:
      return True
    return ssl.create_default_context(cafile=self._ca_file)

  async def _call(
    self, method: str, path: str, body: Mapping[str, Any] | None = None
  ) -> Mapping[str, Any]:
    if self._http is None:
      self._http = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=self._trust()),
        headers={"Authorization": f"Bearer {self._token}"},
      )
    try:
      async with self._http.request(
        method, self._url + path, json=body
      ) as response:
        reply = await response.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
      raise errors.GatewayError(
        f"{method} {self._url}{path}: {type(error).__name__}: {error}"
      ) from error
    if response.status >= 400:
      message = reply.get("error", {}).get("message", reply)
      raise errors.GatewayError(
        f"{method} {self._url}{path}: {response.status}: {message}"
      )
    return reply


def _quoted(id: str) -> str:
  return urllib.parse.quote(id, safe="")
