"""One question, one reply: environments whose answer stands in a tag."""

import re
import string

from forge_jax import types

FORM = "Think first, then give your answer as <answer>...</answer>."
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def find(text: str) -> str | None:
  """What stands in the last answer tag, stripped; None: there is no tag."""
  found = _TAG.findall(text)
  return found[-1].strip() if found else None


def words(text: str) -> list[str]:
  """Words as extractive answers are compared: no case, articles, punctuation.

  As in SQuAD's scorer (Rajpurkar et al., 2016, arXiv 1606.05250, section 6.1).
  """
  kept = "".join(c for c in text.lower() if c not in string.punctuation)
  return _ARTICLES.sub(" ", kept).split()


def overlap(answer: str, truth: str) -> float:
  """F1 of the words of an answer, 0..1 (the same source)."""
  given, wanted = words(answer), words(truth)
  common = sum(min(given.count(w), wanted.count(w)) for w in set(given))
  return 2 * common / (len(given) + len(wanted)) if common else 0.0


def reply(answer: str) -> types.Message:
  """The assistant message that gives an answer."""
  return {"role": "assistant", "content": f"<answer>{answer}</answer>"}


class Question:
  """Asks once and keeps what is answered; a subclass scores it."""

  tools = ()

  def __init__(self, question: str):
    self._question = question
    self.answer: str | None = None  # None: none was given in the form asked for

  def reset(self) -> types.Messages:
    """The question and the form of an answer."""
    return [{"role": "user", "content": f"{self._question}\n\n{FORM}"}]

  def respond(self, reply: types.Message) -> None:
    """Takes the answer; the episode is over."""
    self.answer = find(reply.get("content") or "")

  @property
  def unanswered(self) -> list[types.Reward]:
    """What an answer without its tag costs."""
    if self.answer is not None:
      return []
    return [types.Reward("no_answer", types.Component.PROCESS, -0.1)]
