"""The routes of the Responses protocol beside the one that samples.

GET    /responses/{id}              a stored response
DELETE /responses/{id}
GET    /responses/{id}/input_items  the items that it saw, those of its whole
                                    chain included, page by page
POST   /responses/input_tokens      tokens of a request's prompt
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web
from openai.types import responses
from openai.types.responses import input_token_count_response
import pydantic

from forge_jax.gateway import http, journal, refusal, render, sessions, stored
from forge_jax.gateway.dialects import fields, openai_responses

_MOST_ITEMS = 100


class ResponseRoutes:
  """Serves what a session has stored."""

  def __init__(
    self,
    session_of: Callable[[web.Request], sessions.Session],
    renderer: render.Renderer,
    log: journal.Log,
  ):
    """Serves the sessions that `session_of` finds; `log` keeps what changes."""
    self._session_of = session_of
    self._renderer = renderer
    self._journal = log

  def routes(self, prefix: str) -> list[web.RouteDef]:
    """The routes under a base URL."""
    path = prefix + openai_responses.PATH
    return [
      web.post(path + "/input_tokens", self._count),
      web.get(path + "/{id}", self._get),
      web.delete(path + "/{id}", self._delete),
      web.get(path + "/{id}/input_items", self._input_items),
    ]

  async def _count(self, request: web.Request) -> web.Response:
    session = self._session_of(request)
    body = await http.read_json(request)
    count = openai_responses.count(body, session, self._renderer)
    value = {"object": "response.input_tokens", "input_tokens": count}
    model = input_token_count_response.InputTokenCountResponse
    return _json(model.model_validate(value))

  async def _get(self, request: web.Request) -> web.Response:
    session = self._session_of(request)
    for name in request.query:  # events and other views are not kept
      raise fields.bad(name, "this parameter is not supported")
    response = session.stored.response(request.match_info["id"])
    return _json(responses.Response.model_validate(response.value))

  async def _delete(self, request: web.Request) -> web.Response:
    id = request.match_info["id"]
    session = self._session_of(request)
    self._journal.check()
    session.stored.delete(id)
    await self._journal.sync()
    return web.json_response({"id": id, "object": "response", "deleted": True})

  async def _input_items(self, request: web.Request) -> web.Response:
    session = self._session_of(request)
    response = session.stored.response(request.match_info["id"])
    page = _page(response.context(), request.query)
    return _json(responses.ResponseItemList.model_validate(page))


def _page(
  items: Sequence[stored.Item], query: Mapping[str, str]
) -> dict[str, Any]:
  """The items after the one named, in the order and number asked for."""
  for name in query:
    if name not in ("after", "limit", "order", "include", "include[]"):
      raise fields.bad(name, "this parameter is not supported")
  order, limit = query.get("order", "desc"), query.get("limit", "20")
  if order not in ("asc", "desc"):
    raise fields.bad("order", f"must be 'asc' or 'desc', not {order!r:.40}")
  if not limit.isdecimal() or not 1 <= int(limit) <= _MOST_ITEMS:
    raise fields.bad("limit", f"must be from 1 to {_MOST_ITEMS}")
  items = list(items if order == "asc" else reversed(items))
  if after := query.get("after"):
    places = [n for n, item in enumerate(items) if item["id"] == after]
    if not places:
      raise refusal.Refusal(
        f"after: the response has no item {after!r:.80}", param="after"
      )
    items = items[places[-1] + 1 :]
  page = items[: int(limit)]
  return {
    "object": "list",
    "data": page,
    "first_id": page[0]["id"] if page else "",
    "last_id": page[-1]["id"] if page else "",
    "has_more": len(page) < len(items),
  }


def _json(value: pydantic.BaseModel) -> web.Response:
  return web.Response(
    text=value.model_dump_json(exclude_unset=True, by_alias=True),
    content_type="application/json",
  )
