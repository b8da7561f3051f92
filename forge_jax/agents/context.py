"""What a white-box agent shows its model, and how that changes on the way.

Changing the context is an action: it moves the episode to another state, and
the requests after it are trained on what the model really saw. Strategies:

  none         everything is shown, to the end
  discard_all  over the threshold, all replies and results are dropped
  truncate     of the tool results, only the last `keep` are shown whole
  summarise    over the threshold, the model writes a summary, and goes on from it
  tool         the model decides, by a tool call that keeps a note of its own

Invariants:
  1. What is shown begins with the opening, unchanged.
  2. A result that is shown follows the reply that called for it.
  3. The transcript holds every message there was, and where the context
     changed, a message of the role "context" that says how.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from forge_jax import errors, types
from forge_jax.tasks import base as tasks_base

STRATEGIES = ("none", "discard_all", "truncate", "summarise", "tool")

_OMITTED = "(This result is no longer shown.)"
_SUMMARISE = (
  "Your context is nearly used up. Write down what you have found and what is "
  "left to do. Only this summary, and the task, will be shown to you from now on."
)
_SUMMARY = "What you wrote down before your context was cleared:\n\n"
_TOOL_NAME = "clear_context"
_TOOL = tasks_base.tool(
  _TOOL_NAME,
  "Clears your context of all replies and results. Only the task and your note "
  "are shown afterwards.",
  {"note": tasks_base.TEXT},
)


@dataclasses.dataclass(frozen=True, slots=True)
class ContextConfig:
  """When the context changes, and how."""

  strategy: str = "none"  # one of STRATEGIES
  budget: int = 8192  # tokens of the whole context
  threshold: float = 0.3  # share of it over which discard and summary set in
  keep: int = 3  # tool results that `truncate` shows

  def __post_init__(self):
    if self.strategy not in STRATEGIES:
      raise errors.ConfigError(
        f"context strategy is {self.strategy!r}; expected one of "
        f"{', '.join(STRATEGIES)}"
      )
    if self.budget < 1 or not 0 < self.threshold <= 1 or self.keep < 0:
      raise errors.ConfigError(
        f"context budget is {self.budget}, threshold {self.threshold} and keep "
        f"{self.keep}; expected at least 1, in (0, 1] and at least 0"
      )


class Context:
  """The messages of one episode."""

  def __init__(self, config: ContextConfig, opening: types.Messages):
    """Begins with the messages that open the conversation."""
    self._config = config
    self._opening = [dict(message) for message in opening]
    self._shown = list(self._opening)
    self.transcript: list[types.Message] = list(self._opening)
    self._used = 0  # tokens of the last request and its reply

  @property
  def shown(self) -> list[dict[str, Any]]:
    """What the next request shows."""
    return list(self._shown)

  @property
  def tools(self) -> list[types.Message]:
    """What the model is offered besides the environment's tools."""
    return [_TOOL] if self._config.strategy == "tool" else []

  @property
  def wants_summary(self) -> bool:
    """Whether the model must now be asked for a summary."""
    return self._config.strategy == "summarise" and self._is_over

  @property
  def question(self) -> types.Message:
    """What asks for a summary."""
    return {"role": "user", "content": _SUMMARISE}

  @property
  def _is_over(self) -> bool:
    limit = self._config.threshold * self._config.budget
    return self._used > limit and len(self._shown) > len(self._opening)

  def add_reply(self, reply: types.Message, used: int) -> None:
    """Adds the model's reply; `used` are the tokens of prompt and reply."""
    self._used = used
    self._add(reply)

  def add_observations(self, messages: types.Messages) -> None:
    """Adds what the environment answered, and makes room where that is due."""
    for message in messages:
      self._add(dict(message))
    if self._config.strategy == "discard_all" and self._is_over:
      self._restart(())
    if self._config.strategy == "truncate":
      self._truncate()

  def add_summary(self, reply: types.Message) -> None:
    """Goes on from the model's answer to `question`."""
    self.transcript += [self.question, reply]
    text = reply.get("content") or ""
    self._restart([{"role": "user", "content": _SUMMARY + text}])

  def take_action(
    self, reply: types.Message
  ) -> tuple[types.Message, str | None]:
    """Splits a reply into what is the environment's and what is the context's.

    Returns:
      The reply without calls of `clear_context`, and the note of the last one;
      None: there was none.
    """
    calls = reply.get("tool_calls") or []
    own = [c for c in calls if c["function"]["name"] == _TOOL_NAME]
    if not own or not self.tools:
      return reply, None
    others = [c for c in calls if c["function"]["name"] != _TOOL_NAME]
    rest = {k: v for k, v in reply.items() if k != "tool_calls"}
    if others:
      rest["tool_calls"] = others
    return rest, _note(own[-1]["function"]["arguments"])

  def clear(self, note: str) -> None:
    """Does what a call of `clear_context` asked for."""
    self._restart([{"role": "user", "content": _SUMMARY + note}])

  def _add(self, message: types.Message) -> None:
    self._shown.append(message)
    self.transcript.append(message)

  def _restart(self, messages: Sequence[types.Message]) -> None:
    dropped = len(self._shown) - len(self._opening)
    self._shown = [*self._opening, *messages]
    self._note_change(dropped)
    self.transcript += messages

  def _truncate(self) -> None:
    results = [
      n for n, message in enumerate(self._shown) if message["role"] == "tool"
    ]
    old = results[: len(results) - self._config.keep]
    omitted = [n for n in old if self._shown[n]["content"] != _OMITTED]
    for n in omitted:
      self._shown[n] = {**self._shown[n], "content": _OMITTED}
    if omitted:
      self._note_change(len(omitted))

  def _note_change(self, dropped: int) -> None:
    content = f"{self._config.strategy}: {dropped} messages dropped"
    self.transcript.append({"role": "context", "content": content})


def _note(arguments: Any) -> str:
  """The note of a call; empty if the model wrote none that can be read."""
  try:
    parsed = json.loads(arguments)
  except (ValueError, TypeError):
    return ""
  note = parsed.get("note") if isinstance(parsed, Mapping) else None
  return note if isinstance(note, str) else ""
