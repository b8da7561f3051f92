"""A grammar of requests that no client should send, and of some that one may.

Begins with a body that is fine, for each route, and breaks it: a value anywhere
in it becomes another, a key goes, an item is repeated, bytes are cut or
flipped, a header or the path is wrong.
"""

import copy
import dataclasses
import json
import random
from typing import Any
import urllib.parse

_TOOL = {
  "name": "f",
  "description": "d",
  "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
}
_CALL = {
  "id": "c1",
  "type": "function",
  "function": {"name": "f", "arguments": '{"x": "1"}'},
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
_CHAT = {
  "model": "m",
  "messages": [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "1"},
    {"role": "assistant", "content": "a", "reasoning_content": "r"},
    {"role": "user", "content": "go on"},
  ],
  "tools": [{"type": "function", "function": _TOOL}],
  "tool_choice": "auto",
  "parallel_tool_calls": True,
  "max_tokens": 8,
  "max_completion_tokens": 8,
  "temperature": 0.5,
  "top_p": 0.9,
  "n": 2,
  "seed": 3,
  "stop": ["x"],
  "stream": False,
  "logprobs": True,
  "return_token_ids": True,
  "reasoning_effort": "low",
  "metadata": {"a": "b"},
}
_COMPLETION = {
  "model": "m",
  "prompt": "once",
  "max_tokens": 4,
  "n": 1,
  "echo": True,
  "logprobs": 1,
  "seed": 1,
  "stop": "x",
  "stream": False,
  "temperature": 1,
}
_RESPONSE = {
  "model": "m",
  "instructions": "i",
  "input": [
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {
      "type": "function_call",
      "call_id": "c",
      "name": "f",
      "arguments": "{}",
    },
    {"type": "function_call_output", "call_id": "c", "output": "1"},
    {
      "type": "reasoning",
      "id": "r",
      "summary": [],
      "encrypted_content": "AAAA",
    },
    {"role": "user", "content": "go on"},
  ],
  "tools": [
    {"type": "function", **_TOOL},
    {"type": "custom", "name": "g", "format": {"type": "text"}},
  ],
  "include": ["reasoning.encrypted_content"],
  "store": True,
  "max_output_tokens": 16,
  "reasoning": {"effort": "low", "summary": "auto"},
  "text": {"format": {"type": "text"}, "verbosity": "low"},
  "previous_response_id": None,
  "stream": False,
  "temperature": 1,
}
_MESSAGE = {
  "model": "m",
  "max_tokens": 8,
  "system": [
    {"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}
  ],
  "messages": [
    {"role": "user", "content": "hi"},
    {
      "role": "assistant",
      "content": [
        {"type": "thinking", "thinking": "t", "signature": "AAAA"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
      ],
    },
    {
      "role": "user",
      "content": [
        {
          "type": "tool_result",
          "tool_use_id": "t1",
          "content": [{"type": "text", "text": "1"}],
          "is_error": False,
        },
        {"type": "text", "text": "go on"},
      ],
    },
  ],
  "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
  "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
  "thinking": {"type": "adaptive", "display": "summarized"},
  "output_config": {"effort": "low"},
  "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
  "metadata": {"user_id": "u"},
  "stop_sequences": ["x"],
  "stream": False,
  "temperature": 0.5,
  "top_k": 3,
}
_COUNT = {
  k: _MESSAGE[k] for k in ("model", "system", "messages", "tools", "thinking")
}
_OPEN = {"id": "fuzz", "seed": 1, "sampling": {"temperature": 1.0, "top_k": 4}}
_REWARD = {
  "rewards": [{"name": "a", "value": 1, "component": "perf", "step": 0}]
}
# (method, path, body): {id} is an open session's.
ROUTES: tuple[tuple[str, str, Any], ...] = (
  ("POST", "/v1/chat/completions", _CHAT),
  ("POST", "/v1/completions", _COMPLETION),
  ("POST", "/v1/responses", _RESPONSE),
  ("POST", "/v1/responses/input_tokens", _RESPONSE),
  ("GET", "/v1/responses/resp_x", None),
  ("DELETE", "/v1/responses/resp_x", None),
  ("GET", "/v1/responses/resp_x/input_items?limit=2&order=asc", None),
  ("POST", "/v1/messages?beta=true", _MESSAGE),
  ("POST", "/v1/messages/count_tokens", _COUNT),
  ("GET", "/v1/models", None),
  ("GET", "/v1/models/m", None),
  ("GET", "/health", None),
  ("HEAD", "/", None),
  ("GET", "/metrics", None),
  ("POST", "/admin/sessions", _OPEN),
  ("GET", "/admin/sessions/{id}", None),
  ("GET", "/admin/sessions/{id}/forest", None),
  ("POST", "/sessions/{id}/reward", _REWARD),
  ("POST", "/sessions/other/close", {}),
)
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "X-Y")
_ATOMS: tuple[Any, ...] = (
  None,
  True,
  False,
  0,
  -1,
  2**31,
  2**63,
  -(2**64),
  10**40,
  0.5,
  -0.0,
  1e308,
  float("nan"),
  float("inf"),
  "",
  " ",
  "\x00",
  "\ud800",
  "é☃𝄞",
  "<|im_end|>",
  "<tool_call>\n{",
  "a" * 5000,
  "{{ 1/0 }}",
  "auto",
  "required",
  "none",
  [],
  {},
  [[]],
  {"type": "text"},
  {"role": "user", "content": "x"},
  {"type": "image_url", "image_url": {"url": "x"}},
  {"$ref": "#"},
  {"": None},
)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  """A request as bytes on the wire."""

  method: str
  path: str
  headers: dict[str, str]
  body: bytes


class Grammar:
  """Draws requests; the same seed draws the same ones."""

  def __init__(self, seed: int, session: str, api_key: str, admin_token: str):
    """`session` is open, and `api_key` is its."""
    self._random = random.Random(seed)
    self._session = session
    self._keys = api_key, admin_token

  def draw(self) -> Request:
    """A request of any route, broken in some way or in none."""
    rng = self._random
    method, path, body = rng.choice(ROUTES)
    path = path.replace("{id}", self._session)
    admin = path.startswith(("/admin", "/sessions", "/metrics"))
    key = self._keys[admin]
    if rng.random() < 0.1:
      method = rng.choice(_METHODS)
    if rng.random() < 0.1:
      path = self._break_path(path)
    if path.startswith("/v1") and rng.random() < 0.1:
      path = f"/s/{key}{path}"
    headers = {
      "Authorization": f"Bearer {key}",
      "Content-Type": "application/json",
    }
    if rng.random() < 0.15:
      self._break_headers(headers, key)
    data = b""
    if body is not None:
      body = copy.deepcopy(body)
      if isinstance(body.get("stream"), bool):
        body["stream"] = rng.random() < 0.3
      for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        body = self._break_value(body)
      data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(
        errors="surrogatepass"
      )
      if rng.random() < 0.15:
        data = self._break_bytes(data)
    return Request(method, path, headers, data)

  def _break_value(self, value: Any) -> Any:
    """The value with one place in it changed."""
    rng = self._random
    places = list(_places(value))
    if not places:
      return rng.choice(_ATOMS)
    holder, key = rng.choice(places)
    what = rng.randrange(6)
    if what == 0:
      del holder[key]
    elif what == 1 and isinstance(holder, list):
      holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice((1, 40))
    elif what == 2 and isinstance(holder, dict):
      holder[rng.choice(("type", "extra", "role", "id", "\ud800"))] = (
        holder.pop(key)
      )
    elif what == 3:
      other, there = rng.choice(places)
      if there in other if isinstance(other, dict) else there < len(other):
        holder[key] = copy.deepcopy(other[there])
    elif what == 4:
      depth = rng.choice((3, 60, 3000))
      nested: Any = rng.choice(_ATOMS)
      for _ in range(depth if depth < 900 else 60):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
      holder[key] = nested
    else:
      holder[key] = copy.deepcopy(rng.choice(_ATOMS))
    return value

  def _break_bytes(self, data: bytes) -> bytes:
    rng = self._random
    at = rng.randrange(len(data) + 1)
    return rng.choice(
      (
        data[:at],
        data[:at] + bytes([rng.randrange(256)]) + data[at:],
        data[at:],
        b"\xef\xbb\xbf" + data,
        data.decode(errors="replace").encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 100_000,
        b'{"model":"m","model":"m"}',
        b"\x1f\x8b\x08\x00" + data,
        data.replace(b"null", b"NaN").replace(b"0.5", b"-Infinity"),
      )
    )

  def _break_headers(self, headers: dict[str, str], key: str) -> None:
    rng = self._random
    name, value = rng.choice(
      (
        ("Authorization", ""),
        ("Authorization", "Bearer"),
        ("Authorization", "Bearer " + key[:-1]),
        ("Authorization", "Bearer \xff\xfe"),
        ("Authorization", f"Basic {key}"),
        ("Authorization", "Bearer " + "k" * 7000),
        ("Content-Type", "text/plain; charset=utf-7"),
        ("Content-Type", "multipart/form-data"),
        ("Content-Encoding", "gzip"),
        ("Content-Encoding", "deflate"),
        ("Content-Encoding", "br"),
        ("Accept-Encoding", "*;q=0"),
        ("x-api-key", key),
        ("Expect", "100-continue"),
        ("Expect", "a miracle"),
        ("x-stainless-retry-count", "many"),
        ("x-session-id", "\x7f" * 300),
        ("anthropic-beta", "," * 500),
        ("Range", "bytes=0-1"),
        ("If-Match", "*"),
      )
    )
    headers[name] = value

  def _break_path(self, path: str) -> str:
    rng = self._random
    at = rng.randrange(1, len(path) + 1)
    odd = rng.choice(
      ("%00", "%ff", "..", "//", "?", "%2F", "%", "é", "{x}", "a" * 3000)
    )
    return urllib.parse.quote(path[:at] + odd + path[at:], safe="/%?&={}.")


def _places(value: Any):
  """Every (holder, key) of a JSON value."""
  items = (
    list(value.items())
    if isinstance(value, dict)
    else list(enumerate(value))
    if isinstance(value, list)
    else []
  )
  for key, inner in items:
    yield value, key
    yield from _places(inner)
