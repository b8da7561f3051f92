"""What was sampled, as an Anthropic message: whole, or as a stream of events.

A message has a thinking block if the model reasoned, a text block if it said
something, and a tool_use block per call, in that order. The events are

  message_start
  per block: content_block_start, content_block_delta..., content_block_stop
  message_delta, with the stop reason and the usage
  message_stop

and pings while the model samples what cannot be sent yet.
"""

import dataclasses
import json
import time
from typing import Any

from anthropic import types as wire
import pydantic

from forge_jax import types
from forge_jax.gateway import generation
from forge_jax.gateway.dialects import anthropic_content, anthropic_errors

_PING_S = 10.0  # seconds of silence before a ping


@dataclasses.dataclass(frozen=True, slots=True)
class Style:
  """How a request wants its reply to be said."""

  model: str
  max_tokens: int
  show_thinking: bool = True  # False: a thinking block has a signature only
  return_token_ids: bool = False  # of prompt and reply, beside the content


def whole(generated: generation.Generation, style: Style) -> str:
  """The JSON of a finished message."""
  value = _message(generated, style) | {
    "content": _blocks(generated, style),
    **_ending(generated, style),
    "usage": _usage(generated),
  }
  if style.return_token_ids:
    value["prompt_token_ids"] = generated.plan.prompt_ids.tolist()
    value["token_ids"] = generated.token_ids
  return wire.Message.model_validate(value).model_dump_json(exclude_unset=True)


class MessageStream:
  """Writes the server-sent events of one streamed message."""

  def __init__(self, generated: generation.Generation, style: Style):
    self._generated = generated
    self._style = style
    self._begun = False
    self._index = -1  # of the latest content block
    self._open: str | None = None  # its type, until it is stopped
    self._reasoning = ""
    self._sent = 0.0  # when something was sent, seconds

  def delta(self, choice: int, delta: generation.Delta) -> str:
    """The events of new tokens; empty if there is nothing to send."""
    del choice  # there is one
    events = []
    if not self._begun:
      events.append(self._start_message())
    if delta.reasoning:
      events += self._think(delta.reasoning)
    if delta.content:
      events += self._say(delta.content)
    now = time.monotonic()
    if not events and now - self._sent >= _PING_S:
      events = ['event: ping\ndata: {"type": "ping"}\n\n']
    if events:
      self._sent = now
    return "".join(events)

  def end(self) -> str:
    """The events that finish the stream."""
    generated = self._generated
    events = self._stop_block()
    for block in _calls(generated):
      partial_json = json.dumps(block["input"], ensure_ascii=False)
      events += self._start_block({**block, "input": {}})
      events.append(
        self._delta("input_json_delta", {"partial_json": partial_json})
      )
      events += self._stop_block()
    message_delta = {
      "type": "message_delta",
      "delta": _ending(generated, self._style),
      "usage": _usage(generated),
    }
    if self._style.return_token_ids:
      message_delta["prompt_token_ids"] = generated.plan.prompt_ids.tolist()
      message_delta["token_ids"] = generated.token_ids
    events.append(_event(wire.RawMessageDeltaEvent, message_delta))
    events.append(_event(wire.RawMessageStopEvent, {"type": "message_stop"}))
    return "".join(events)

  def fail(self, failure: BaseException) -> str:
    """The event of a failure of a stream that has begun."""
    value = json.dumps(anthropic_errors.error(failure)[1])
    return f"event: error\ndata: {value}\n\n"

  def _start_message(self) -> str:
    self._begun = True
    message = _message(self._generated, self._style) | {
      "content": [],
      "stop_reason": None,
      "stop_sequence": None,
      "usage": _usage(self._generated),
    }
    return _event(
      wire.RawMessageStartEvent, {"type": "message_start", "message": message}
    )

  def _think(self, reasoning: str) -> list[str]:
    events = []
    if self._open != "thinking":
      empty = {"type": "thinking", "thinking": "", "signature": ""}
      events = [*self._stop_block(), *self._start_block(empty)]
    self._reasoning += reasoning
    if self._style.show_thinking:
      events.append(self._delta("thinking_delta", {"thinking": reasoning}))
    return events

  def _say(self, text: str) -> list[str]:
    events = []
    if self._open != "text":
      empty = {"type": "text", "text": ""}
      events = [*self._stop_block(), *self._start_block(empty)]
    return [*events, self._delta("text_delta", {"text": text})]

  def _start_block(self, block: dict[str, Any]) -> list[str]:
    self._index += 1
    self._open = block["type"]
    start = {
      "type": "content_block_start",
      "index": self._index,
      "content_block": block,
    }
    return [_event(wire.RawContentBlockStartEvent, start)]

  def _delta(self, kind: str, fields: dict[str, str]) -> str:
    delta = {
      "type": "content_block_delta",
      "index": self._index,
      "delta": {"type": kind, **fields},
    }
    return _event(wire.RawContentBlockDeltaEvent, delta)

  def _stop_block(self) -> list[str]:
    """Ends the open block, if there is one."""
    if self._open is None:
      return []
    events = []
    if self._open == "thinking":
      signature = anthropic_content.signature(self._reasoning)
      events.append(self._delta("signature_delta", {"signature": signature}))
      self._reasoning = ""
    self._open = None
    stop = {"type": "content_block_stop", "index": self._index}
    return [*events, _event(wire.RawContentBlockStopEvent, stop)]


def _event(kind: type[pydantic.BaseModel], value: dict[str, Any]) -> str:
  data = kind.model_validate(value).model_dump_json(exclude_unset=True)
  return f"event: {value['type']}\ndata: {data}\n\n"


def _message(generated: generation.Generation, style: Style) -> dict[str, Any]:
  return {
    "id": f"msg_{generated.plan.request_id}",
    "type": "message",
    "role": "assistant",
    "model": style.model,
  }


def _blocks(
  generated: generation.Generation, style: Style
) -> list[dict[str, Any]]:
  reply, blocks = generated.reply, []
  if reply.reasoning:
    blocks.append(
      {
        "type": "thinking",
        "thinking": reply.reasoning if style.show_thinking else "",
        "signature": anthropic_content.signature(reply.reasoning),
      }
    )
  if reply.content:
    blocks.append({"type": "text", "text": reply.content})
  return blocks + _calls(generated)


def _calls(generated: generation.Generation) -> list[dict[str, Any]]:
  return [
    {
      "type": "tool_use",
      "id": call["id"],
      "name": call["function"]["name"],
      "input": json.loads(call["function"]["arguments"]),
    }
    for call in generated.message().get("tool_calls", ())
  ]


def _ending(
  generated: generation.Generation, style: Style
) -> dict[str, str | None]:
  """Why the message ended."""
  reason, stop = "end_turn", None
  if generated.reply.tool_calls:
    reason = "tool_use"
  elif generated.stop_reason == types.StopReason.LENGTH:
    reason = "max_tokens"
    if len(generated.token_ids) < style.max_tokens:
      reason = "model_context_window_exceeded"
  elif generated.stop_string is not None:
    reason, stop = "stop_sequence", generated.stop_string
  return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None}


def _usage(generated: generation.Generation) -> dict[str, int]:
  cached = generated.cached_tokens
  return {
    "input_tokens": len(generated.plan.prompt_ids) - cached,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": cached,
    "output_tokens": len(generated.token_ids),
  }
