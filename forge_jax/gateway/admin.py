"""The routes that open, inspect, score and close sessions.

  POST /admin/sessions              {id, seed, sampling}
                                    -> {id, api_key, control_key}
  GET  /admin/sessions/<id>         counts
  GET  /admin/sessions/<id>/forest  the captured forest so far
  POST /sessions/<id>/reward        {rewards: [...]}, see `wire`
  POST /sessions/<id>/close         -> {completions: [...], rewards: [...]}

A close whose answer does not arrive may be sent again: the session is held for
some seconds, see `session_table`.

Routes under /admin need the admin token; the others that, or the control key of
the very session. Keys are compared in constant time.
"""

import hmac
from typing import Any

from aiohttp import web

from forge_jax.gateway import (
  http,
  journal,
  refusal,
  session_table,
  sessions,
  wire,
)

_SAMPLING = {  # name -> (type, lowest, highest)
  "temperature": (float, 0.0, 2.0),
  "top_p": (float, 0.0, 1.0),
  "top_k": (int, 0, 2**31 - 1),
  "min_p": (float, 0.0, 1.0),
}


class AdminRoutes:
  """Handlers over one table of sessions."""

  def __init__(
    self, table: session_table.SessionTable, log: journal.Log, token: str
  ):
    """`token` is what a request must bear; `log` keeps what is answered."""
    self._table = table
    self._journal = log
    self._token = session_table.key_digest(token)

  def routes(self) -> list[web.RouteDef]:
    """The routes and their handlers."""
    base = "/admin/sessions"
    return [
      web.post(base, self._open),
      web.get(base + "/{id}", self._summary),
      web.get(base + "/{id}/forest", self._forest),
      web.post("/sessions/{id}/reward", self._reward),
      web.post("/sessions/{id}/close", self._close),
    ]

  async def _open(self, request: web.Request) -> web.Response:
    self.check(request)
    self._journal.check()
    opened = self._table.open(*_opening(await http.read_json(request)))
    try:
      await self._journal.sync()
    except refusal.Refusal:  # the client will open it again
      await self._table.close(opened.session)
      raise
    return web.json_response(
      {
        "id": opened.session.id,
        "api_key": opened.api_key,
        "control_key": opened.control_key,
      }
    )

  async def _summary(self, request: web.Request) -> web.Response:
    return web.json_response(self._session(request).summary())

  async def _forest(self, request: web.Request) -> web.Response:
    session = self._session(request)
    return web.json_response({"id": session.id, "nodes": session.forest_json()})

  async def _reward(self, request: web.Request) -> web.Response:
    session = self._controlled(request)
    body = await http.read_json(request)
    rewards = body.get("rewards") if isinstance(body, dict) else None
    if not isinstance(rewards, list):
      raise refusal.Refusal("a list of rewards is required", param="rewards")
    try:
      parsed = [wire.reward_from_json(reward) for reward in rewards]
    except (ValueError, TypeError) as error:
      raise refusal.Refusal(str(error), param="rewards") from error
    if session.closed:
      raise refusal.Refusal(f"session {session.id!r} is closed", status=409)
    self._journal.check()
    session.rewards.add(parsed, request.headers.get("Idempotency-Key"))
    await self._journal.sync()
    return web.json_response({"rewards": len(session.rewards.all)})

  async def _close(self, request: web.Request) -> web.Response:
    session = self._controlled(request)
    await self._table.close(session)
    return web.json_response(
      {
        "completions": wire.completions_to_json(session.completions()),
        "rewards": [wire.reward_to_json(r) for r in session.rewards.all],
      }
    )

  def _session(self, request: web.Request) -> sessions.Session:
    self.check(request)
    return self._table.by_id(request.match_info["id"])

  def _controlled(self, request: web.Request) -> sessions.Session:
    id = request.match_info["id"]
    if not self._table.controls(http.bearer(request), id):
      self.check(request)
    return self._table.by_id(id)

  def check(self, request: web.Request) -> None:
    """Raises Refusal unless a request bears the admin token."""
    given = session_table.key_digest(http.bearer(request))
    if not hmac.compare_digest(given, self._token):
      raise refusal.unauthorised("the admin token is missing or wrong")


def _opening(body: Any) -> tuple[str, int, dict[str, float]]:
  """The id, the seed and the sampling defaults of a session to open."""
  if not isinstance(body, dict):
    raise refusal.Refusal("the body must be a JSON object")
  id, seed = body.get("id"), body.get("seed", 0)
  if not isinstance(id, str) or not 0 < len(id) <= 256:
    raise refusal.Refusal("id: must be 1 to 256 characters", param="id")
  if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
    raise refusal.Refusal("seed: must be an integer >= 0", param="seed")
  sampling = body.get("sampling") or {}
  if not isinstance(sampling, dict):
    raise refusal.Refusal("sampling: must be an object", param="sampling")
  for name, value in sampling.items():
    if name not in _SAMPLING:
      raise refusal.Refusal(
        f"sampling.{name}: known are {sorted(_SAMPLING)}",
        param=f"sampling.{name}",
      )
    kind, low, high = _SAMPLING[name]
    kinds = int if kind is int else int | float
    if (
      isinstance(value, bool)
      or not isinstance(value, kinds)
      or not low <= value <= high
    ):
      raise refusal.Refusal(
        f"sampling.{name}: must be from {low} to {high}, not {value!r}",
        param=f"sampling.{name}",
      )
  return id, seed, sampling
