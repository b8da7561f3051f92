"""What an agent wants a completion for, told from what its request holds.

In this order:
  one that says that it is a sub-agent's (x-forge-sub-agent) is SUB_AGENT;
  a request without tools that asks for a title is TITLE;
  one that asks, at its end or in its system prompt, for a summary of the
    conversation, when something was recorded before, is COMPACTION, as is what
    Codex marks as such;
  one with an agent's id, as Claude Code's and Codex's sub-agents have, is
    SUB_AGENT;
  one that goes on from a completion is of its kind; after a compaction, MAIN;
  one that begins anew, with another system prompt than the main conversation,
    is SUB_AGENT, unless it replays what was recorded: that is a hand-over.
All else is MAIN. It is a guess, but for the first, for reports and filters; and for
credit, where sub-agents get less of it than others.
"""

from collections.abc import Mapping
import re

from forge_jax import types
from forge_jax.gateway import attempts

_TITLE = re.compile(
  r"\btitle generator\b"
  r"|\b(generate|create|write|suggest|extract|produce|provide|come up with)\b"
  r".{0,60}\btitle\b",
  re.IGNORECASE | re.DOTALL,
)
_COMPACTION = re.compile(
  r"\b(summar(y|ies|i[sz]e|i[sz]ing|i[sz]ation)|handoff|compact(ion|ing)?)\b"
  r".{0,80}\b(conversation|context|history|session|transcript)"
  r"|\b(conversation|context|session)\b.{0,40}"
  r"\b(summar(y|i[sz]e|i[sz]ing|i[sz]ation)|handoff|compaction|checkpoint)\b",
  re.IGNORECASE | re.DOTALL,
)
_READ = 2000  # characters of a prompt that are looked at
_SAME = 200  # characters in which the prompts of one agent agree
_AGENTS = ("x-claude-code-agent-id", "x-openai-subagent")


class Kinds:
  """Tells the kinds of one session's requests."""

  def __init__(self):
    """No request has come yet."""
    self._main: str | None = None  # how the main system prompt begins

  def tell(
    self,
    messages: types.Messages,
    tools: types.Messages,
    client_ids: Mapping[str, str],
    *,
    parent: types.RequestKind | None,
    replays: bool,
    first: bool,
  ) -> types.RequestKind:
    """The kind of a request.

    Args:
      messages: its conversation; empty for a raw prompt.
      tools: that it offers.
      client_ids: see types.Request.
      parent: kind of the completion that it goes on from, if any.
      replays: whether it replays something recorded that it does not extend.
      first: whether nothing was recorded before.
    """
    if attempts.SUB_AGENT in client_ids:
      return types.RequestKind.SUB_AGENT
    system, last = _ends(messages)
    if not tools and (_TITLE.search(system) or _TITLE.search(last)):
      return types.RequestKind.TITLE
    if client_ids.get("x-openai-subagent") == "compact" or (
      not first and (_COMPACTION.search(last) or _COMPACTION.search(system))
    ):
      return types.RequestKind.COMPACTION
    if any(name in client_ids for name in _AGENTS):
      return types.RequestKind.SUB_AGENT
    if parent is not None:
      compacted = parent == types.RequestKind.COMPACTION
      return types.RequestKind.MAIN if compacted else parent
    begins = system[:_SAME]
    self.restore(messages)
    if begins != self._main and not replays:
      return types.RequestKind.SUB_AGENT
    return types.RequestKind.MAIN

  def restore(self, messages: types.Messages) -> None:
    """Tells what the main conversation is, if that is not known."""
    if self._main is None:
      self._main = _ends(messages)[0][:_SAME]


def _ends(messages: types.Messages) -> tuple[str, str]:
  """The beginnings of the system prompt and of what the user said last."""
  system = last = ""
  if messages and messages[0]["role"] == "system":
    system = messages[0]["content"][:_READ]
  if messages and messages[-1]["role"] == "user":
    last = messages[-1]["content"][:_READ]
  return system, last
