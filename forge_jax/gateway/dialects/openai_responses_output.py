"""A finished generation as the items and the usage of a Responses reply.

The reasoning of a model is no secret here. It is sent once: as the summary, one
part that is the whole reasoning, to a request that asks for summaries, else as
`reasoning_text`.

Log-probabilities on a message are those of all sampled tokens, reasoning,
markup and stop token included.
"""

import dataclasses
import hashlib
from typing import Any

from forge_jax import types
from forge_jax.gateway import generation, render, stored
from forge_jax.gateway.dialects import (
  openai_logprobs,
  openai_responses_input,
  openai_responses_tools,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
  """What a request wants to see in the items of its reply."""

  tools: openai_responses_tools.Tools
  summary: bool = False  # the reasoning as a summary
  sealed: bool = False  # the reasoning as encrypted_content too
  logprobs: bool = False


def response_key(request_id: str) -> str:
  """What the ids of a response and its items have in common."""
  return hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()


def is_cut(generated: generation.Generation) -> bool:
  """Whether the reply is incomplete: cut by its budget, with no call to run."""
  cut = generated.stop_reason == types.StopReason.LENGTH
  return cut and not generated.reply.tool_calls


def items(
  generated: generation.Generation,
  form: Form,
  renderer: render.Renderer,
  ledger: stored.Stored,
) -> list[dict[str, Any]]:
  """The output items of a finished generation."""
  message, key = generated.message(), response_key(generated.plan.request_id)
  reasoning, text = message.get("reasoning_content"), message["content"]
  calls = message.get("tool_calls", ())
  output = []
  if reasoning:
    output.append(reasoning_item(key, form, reasoning))
  if text or not (reasoning or calls):
    said = None
    if form.logprobs:
      said = logprobs(renderer, generated)
    output.append(message_item(key, text or "", said))
  output += [
    form.tools.item(call, f"{key}_{n}", ledger) for n, call in enumerate(calls)
  ]
  if is_cut(generated):
    output[-1]["status"] = "incomplete"
  return output


def reasoning_item(key: str, form: Form, text: str) -> dict[str, Any]:
  """The item of a reasoning; with an empty text, one that has only begun."""
  item: dict[str, Any] = {
    "type": "reasoning",
    "id": f"rs_{key}",
    "summary": [],
    "status": "completed" if text else "in_progress",
  }
  if text and form.summary:
    item["summary"] = [{"type": "summary_text", "text": text}]
  elif text:
    item["content"] = [{"type": "reasoning_text", "text": text}]
  if form.sealed:
    item["encrypted_content"] = openai_responses_input.seal(text)
  return item


def message_item(
  key: str, text: str, said: list[dict[str, Any]] | None
) -> dict[str, Any]:
  """The item of a message; `said` are its log-probabilities, if asked for."""
  part = {"type": "output_text", "text": text, "annotations": []}
  if said is not None:
    part["logprobs"] = said
  return {
    "type": "message",
    "id": f"msg_{key}",
    "role": "assistant",
    "status": "completed",
    "content": [part],
  }


def text_of(item: dict[str, Any]) -> str:
  """The text of a reasoning or of a message."""
  return (item.get("content") or item["summary"])[0]["text"]


def logprobs(
  renderer: render.Renderer, said: generation.Generation | generation.Delta
) -> list[dict[str, Any]]:
  """Sampled tokens with their log-probabilities and alternatives, in nats."""
  return openai_logprobs.of(
    renderer, said.token_ids, said.logprobs, said.top_logprobs
  )


def usage(
  generated: generation.Generation, renderer: render.Renderer
) -> dict[str, Any]:
  """Token counts; cached are those that the recorded parent brought."""
  prompt, sampled = len(generated.plan.prompt_ids), len(generated.token_ids)
  return {
    "input_tokens": prompt,
    "input_tokens_details": {
      "cached_tokens": generated.cached_tokens,
      "cache_write_tokens": 0,
    },
    "output_tokens": sampled,
    "output_tokens_details": {
      "reasoning_tokens": _reasoning_tokens(generated, renderer)
    },
    "total_tokens": prompt + sampled,
  }


def _reasoning_tokens(
  generated: generation.Generation, renderer: render.Renderer
) -> int:
  """Tokens up to the end of the reasoning, its markup included."""
  if not generated.reply.reasoning:
    return 0
  ids = generated.token_ids
  if renderer.think_close_id in ids:
    return ids.index(renderer.think_close_id) + 1
  said = generated.reply.content or generated.reply.tool_calls
  return 0 if said else len(ids)
