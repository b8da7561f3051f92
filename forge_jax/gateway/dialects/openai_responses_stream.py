"""The server-sent events of a streamed Responses reply.

    response.created, response.in_progress
    an output item at a time: output_item.added, its parts and deltas,
      output_item.done
    response.completed, or response.incomplete for a reply that was cut;
    response.failed if sampling fails when the stream has begun

Every event has a sequence number, from 0. A call is sent whole, as one delta.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from openai.types import responses

from forge_jax.gateway import generation, render
from forge_jax.gateway.dialects import openai_errors
from forge_jax.gateway.dialects import openai_responses_output as output

_MODELS = {
  "response.created": responses.ResponseCreatedEvent,
  "response.in_progress": responses.ResponseInProgressEvent,
  "response.completed": responses.ResponseCompletedEvent,
  "response.incomplete": responses.ResponseIncompleteEvent,
  "response.failed": responses.ResponseFailedEvent,
  "response.output_item.added": responses.ResponseOutputItemAddedEvent,
  "response.output_item.done": responses.ResponseOutputItemDoneEvent,
  "response.content_part.added": responses.ResponseContentPartAddedEvent,
  "response.content_part.done": responses.ResponseContentPartDoneEvent,
  "response.output_text.delta": responses.ResponseTextDeltaEvent,
  "response.output_text.done": responses.ResponseTextDoneEvent,
  "response.reasoning_text.delta": responses.ResponseReasoningTextDeltaEvent,
  "response.reasoning_text.done": responses.ResponseReasoningTextDoneEvent,
  "response.reasoning_summary_part.added": (
    responses.ResponseReasoningSummaryPartAddedEvent
  ),
  "response.reasoning_summary_part.done": (
    responses.ResponseReasoningSummaryPartDoneEvent
  ),
  "response.reasoning_summary_text.delta": (
    responses.ResponseReasoningSummaryTextDeltaEvent
  ),
  "response.reasoning_summary_text.done": (
    responses.ResponseReasoningSummaryTextDoneEvent
  ),
  "response.function_call_arguments.delta": (
    responses.ResponseFunctionCallArgumentsDeltaEvent
  ),
  "response.function_call_arguments.done": (
    responses.ResponseFunctionCallArgumentsDoneEvent
  ),
  "response.custom_tool_call_input.delta": (
    responses.ResponseCustomToolCallInputDeltaEvent
  ),
  "response.custom_tool_call_input.done": (
    responses.ResponseCustomToolCallInputDoneEvent
  ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
  """The events of a text, and of the part of an item that it is."""

  text: str
  part: str
  index: str  # how its events name the part's place
  shape: dict[str, Any]  # the part but for its text


_MESSAGE = _Kind(
  "response.output_text",
  "response.content_part",
  "content_index",
  {"type": "output_text", "annotations": []},
)
_REASONING = _Kind(
  "response.reasoning_text",
  "response.content_part",
  "content_index",
  {"type": "reasoning_text"},
)
_SUMMARY = _Kind(
  "response.reasoning_summary_text",
  "response.reasoning_summary_part",
  "summary_index",
  {"type": "summary_text"},
)


@dataclasses.dataclass(slots=True)
class _Open:
  """The item that is being sent."""

  kind: _Kind
  id: str
  text: str = ""  # sent


class ResponseStream:
  """Writes the events of one reply.

  Invariants: at most one item is open, the one begun last; the pieces sent of
  an item make up its text in the finished response.
  """

  def __init__(
    self,
    generated: generation.Generation,
    form: output.Form,
    renderer: render.Renderer,
    response: Callable[[str], dict[str, Any]],
    finish: Callable[[], dict[str, Any]],
  ):
    """Begins a stream.

    Args:
      generated: what is sampled.
      form: of the items.
      renderer: of the model.
      response: the response of a status that is not finished.
      finish: the finished response; called once.
    """
    self._form = form
    self._renderer = renderer
    self._response = response
    self._finish = finish
    self._key = output.response_key(generated.plan.request_id)
    self._events: list[str] = []  # to be sent
    self._number = 0  # of the next event
    self._index = -1  # of the item begun last
    self._open: _Open | None = None
    self._sent: set[str] = set()  # ids of the items that are done
    self._unsent: list[dict[str, Any]] = []  # log-probabilities

  def delta(self, choice: int, delta: generation.Delta) -> str:
    """The events of new tokens; empty if there is nothing to send."""
    self._begin()
    if self._form.logprobs:
      self._unsent += output.logprobs(self._renderer, delta)
    in_message = self._open is not None and self._open.kind is _MESSAGE
    if delta.reasoning and not in_message:
      self._say(_SUMMARY if self._form.summary else _REASONING, delta.reasoning)
    if delta.content:
      if self._open and not in_message:
        text = self._open.text
        self._close(output.reasoning_item(self._key, self._form, text))
      self._say(_MESSAGE, delta.content)
    return self._take()

  def end(self) -> str:
    """The events that finish the stream."""
    response = self._finish()
    for item in response["output"]:
      if item["id"] in self._sent:
        continue
      if item["type"] in ("function_call", "custom_tool_call"):
        self._call(item)
      else:
        self._complete(item)
    self._event(f"response.{response['status']}", response=response)
    return self._take()

  def fail(self, failure: BaseException) -> str:
    """The events of a failure of a stream that has begun."""
    message = openai_errors.error(failure)[1]["error"]["message"]
    response = self._response("failed")
    response["error"] = {"code": "server_error", "message": message}
    self._event("response.failed", response=response)
    return self._take()

  def _begin(self) -> None:
    if not self._number:
      for kind in ("created", "in_progress"):
        self._event(f"response.{kind}", response=self._response("in_progress"))

  def _say(self, kind: _Kind, text: str) -> None:
    """Sends a piece of the open item, or of a new one."""
    if self._open is None:
      self._open_item(kind)
    self._open.text += text
    self._text_event("delta", delta=text, logprobs=self._unsent)
    if kind is _MESSAGE:
      self._unsent = []

  def _open_item(self, kind: _Kind) -> None:
    if kind is _MESSAGE:
      item = output.message_item(self._key, "", None)
      item = {**item, "status": "in_progress", "content": []}
    else:
      item = output.reasoning_item(self._key, self._form, "")
    self._add(item)
    self._open = _Open(kind, item["id"])
    self._part_event("added", "")

  def _complete(self, item: dict[str, Any]) -> None:
    """Sends what was not yet sent of a finished item."""
    kind = _MESSAGE
    if item["type"] == "reasoning":
      kind = _SUMMARY if self._form.summary else _REASONING
    if self._open is None:
      self._open_item(kind)
    text = output.text_of(item)
    if rest := text[len(self._open.text) :]:
      self._say(kind, rest)
    self._close(item)

  def _close(self, item: dict[str, Any]) -> None:
    """Sends the end of the open item."""
    text = self._open.text
    said = {}
    if item["type"] == "message" and self._form.logprobs:
      said["logprobs"] = item["content"][0]["logprobs"]
    self._text_event("done", text=text, logprobs=said.get("logprobs", []))
    self._part_event("done", text, **said)
    self._open = None
    self._done(item)

  def _call(self, item: dict[str, Any]) -> None:
    """Sends a call, whole."""
    name, events = "input", "response.custom_tool_call_input"
    if item["type"] == "function_call":
      name, events = "arguments", "response.function_call_arguments"
    self._add({**item, name: "", "status": "in_progress"})
    place = {"item_id": item["id"], "output_index": self._index}
    self._event(f"{events}.delta", delta=item[name], **place)
    self._event(f"{events}.done", **{name: item[name]}, **place)
    self._done(item)

  def _add(self, item: dict[str, Any]) -> None:
    self._index += 1
    self._event(
      "response.output_item.added", item=item, output_index=self._index
    )

  def _done(self, item: dict[str, Any]) -> None:
    self._sent.add(item["id"])
    self._event(
      "response.output_item.done", item=item, output_index=self._index
    )

  def _text_event(self, name: str, *, logprobs: Any, **fields: Any) -> None:
    kind = self._open.kind
    if kind is _MESSAGE:
      fields["logprobs"] = logprobs
    self._event(f"{kind.text}.{name}", **self._place(), **fields)

  def _part_event(self, name: str, text: str, **fields: Any) -> None:
    kind = self._open.kind
    part = {**kind.shape, "text": text, **fields}
    self._event(f"{kind.part}.{name}", **self._place(), part=part)

  def _place(self) -> dict[str, Any]:
    return {
      "item_id": self._open.id,
      "output_index": self._index,
      self._open.kind.index: 0,
    }

  def _event(self, type: str, **fields: Any) -> None:
    value = {"type": type, "sequence_number": self._number, **fields}
    self._number += 1
    event = _MODELS[type].model_validate(value)
    text = event.model_dump_json(exclude_unset=True, by_alias=True)
    self._events.append(f"event: {type}\ndata: {text}\n\n")

  def _take(self) -> str:
    events, self._events = self._events, []
    return "".join(events)
