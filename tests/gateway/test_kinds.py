"""What a request is for, in the words of agents in use."""

import pytest

from forge_jax import types
from forge_jax.gateway import kinds

MAIN, SUB_AGENT, TITLE, COMPACTION = types.RequestKind
TOOLS = [{"type": "function", "function": {"name": "bash"}}]


def tell(
  told, system, user, *, tools=TOOLS, ids=(), parent=None, replays=False
):
  messages = [{"role": "system", "content": system}] if system else []
  messages.append({"role": "user", "content": user})
  return told.tell(
    messages, tools, dict(ids), parent=parent, replays=replays, first=False
  )


@pytest.fixture
def told():
  told = kinds.Kinds()
  assert tell(told, "You are a coding agent.", "Fix the bug.") == MAIN
  return told


@pytest.mark.parametrize(
  ("system", "user"),
  [
    ("You are a title generator. You output ONLY a thread title.", "Fix it"),
    ("Generate a concise, sentence-case title (3-7 words).", "Fix it"),
    ("", "Please write a 5-10 word title for the following conversation:"),
  ],
)
def test_titles(told, system, user):
  assert tell(told, system, user, tools=()) == TITLE
  assert tell(told, system, user) != TITLE  # an agent with tools is at work


@pytest.mark.parametrize(
  ("system", "user"),
  [
    (
      "You are a coding agent.",
      "Your task is to create a detailed summary of the conversation so far",
    ),
    (
      "You are a helpful AI assistant tasked with summarizing conversations.",
      "Provide a detailed prompt for continuing.",
    ),
    (
      "You are a coding agent.",
      "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff "
      "summary for another LLM that will resume the task.",
    ),
    (
      "You are a context summarization assistant.",
      "<conversation>...</conversation> Create a structured context checkpoint "
      "summary that another LLM will use to continue the work.",
    ),
  ],
)
def test_compactions(told, system, user):
  assert tell(told, system, user) == COMPACTION
  assert tell(told, system, user, parent=MAIN) == COMPACTION


def test_what_goes_on_from_a_completion_is_of_its_kind(told):
  said = "You are another agent.", "Go on."
  assert tell(told, *said, parent=SUB_AGENT) == SUB_AGENT
  assert tell(told, *said, parent=MAIN) == MAIN
  assert tell(told, *said, parent=COMPACTION) == MAIN


def test_sub_agents(told):
  main = "You are a coding agent."
  assert tell(told, main, "Another conversation.") == MAIN
  assert tell(told, "You search files.", "Find x.") == SUB_AGENT
  # Another agent that takes over the history is no sub-agent.
  assert tell(told, "You report.", "Go on.", replays=True) == MAIN
  ids = {"x-claude-code-agent-id": "a1"}
  assert tell(told, main, "Find x.", ids=ids) == SUB_AGENT
  ids = {"x-openai-subagent": "review"}
  assert tell(told, main, "Review.", ids=ids) == SUB_AGENT
  ids = {"x-openai-subagent": "compact"}
  assert tell(told, main, "Do.", ids=ids) == COMPACTION
  # Of what says so itself, even the summaries and titles are a sub-agent's.
  ids = {"x-forge-sub-agent": "sub-agent 1"}
  for user in ("Summarise this conversation.", "Write a title for this."):
    assert tell(told, main, user, tools=(), ids=ids, parent=MAIN) == SUB_AGENT


def test_a_title_may_come_first():
  told = kinds.Kinds()
  assert tell(told, "You are a title generator.", "Hi", tools=()) == TITLE
  assert tell(told, "You are a coding agent.", "Hi") == MAIN


def test_a_task_about_a_summary_is_no_compaction():
  messages = [{"role": "user", "content": "Summarize this conversation: ..."}]
  kind = kinds.Kinds().tell(
    messages, (), {}, parent=None, replays=False, first=True
  )
  assert kind == MAIN
  assert (
    kinds.Kinds().tell((), (), {}, parent=None, replays=False, first=False)
    == MAIN
  )
