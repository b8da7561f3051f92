"""Every family of `renderers`: random conversations through a session.

What a session shows a model, token by token extended, is compared with the
family's rendering of the whole conversation, from scratch.
"""

import json
import pathlib

from family_models import FAMILIES, renderer_of, sampled, tokenizer_of, whole
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import pytest
from renderers import base

from forge_jax import errors, types
from forge_jax.gateway import call_ids, families, render, sessions

MOST_CALLS = {"llama-3": 1, "gpt-oss": 1}
# Its template keeps only the reasoning beside calls.
PARTLY = {"gemma4"}
WRITES_IDS = {"kimi-k2", "kimi-k2.5"}
CALCULATE = {
  "type": "function",
  "function": {
    "name": "calculate",
    "description": "Calculates.",
    "parameters": {
      "type": "object",
      "properties": {"expression": {"type": "string"}},
      "required": ["expression"],
    },
  },
}
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
WORDS = st.text('ab é漢.,:"', max_size=8).map(str.strip)


@st.composite
def steps(draw):
  """What is said and answered, in turn: (calls, reasons, user speaks, words)."""
  step = st.tuples(st.integers(0, 2), st.booleans(), st.booleans(), WORDS)
  return draw(st.lists(step, min_size=1, max_size=4))


class Episode:
  """A conversation as the model knows it, and as its client sends it."""

  def __init__(self, renderer, tools):
    self.renderer, self.tools = renderer, tools
    self.session = sessions.Session("s", seed=0, sampling={})
    self.messages = [
      {"role": "system", "content": "Be brief."},
      {"role": "user", "content": "question"},
    ]
    self.sent = [*self.messages]
    self.calls = 0
    self.number = 0
    self.mark = ""  # a text of the last reply that is nowhere else
    self.said_after = ""  # what was sampled after it

  def begin(self):
    return self.session.begin(self.renderer, self.sent, self.tools)

  def reply(self, plan, calls, reasons, words):
    """The model replies, with or without reasoning, as its template can."""
    calls = min(calls, MOST_CALLS.get(self.renderer.name, calls))
    self.number += 1
    self.mark = f"<{self.number}>"
    message, ids = self._said(calls, reasons, words)
    if ids is None:
      message, ids = self._said(calls, not reasons, words)
    assert ids is not None
    reply = self.renderer.parse(plan.prompt_ids, ids, self.tools)
    assert not reply.malformed
    assert reply.content.strip() == message["content"]
    assert (reply.reasoning or "").strip() == message.get(
      "reasoning_content", ""
    )
    sent = {"role": "assistant", "content": reply.content}
    if reply.reasoning is not None:
      sent["reasoning_content"] = reply.reasoning
    kept = {**sent}
    if calls:
      sent["tool_calls"], kept["tool_calls"] = self._calls(plan, reply, message)
    self.session.record(
      plan,
      response_ids=ids,
      logprobs=[-1.0] * len(ids),
      versions=[0] * len(ids),
      stop_reason=types.StopReason.STOP,
      reply=kept,
    )
    self.messages.append(message)
    self.sent.append(sent)
    _, _, self.said_after = self.text(ids).rpartition(self.mark)

  def answer(self, user, words):
    """The results of the last calls, if any, and what the user says."""
    native = self.messages[-1].get("tool_calls", ())
    sent = self.sent[-1].get("tool_calls", ())
    for known, call in zip(native, sent, strict=True):
      result = {"role": "tool", "content": f"r{words}"}
      name = known["function"]["name"]
      self.messages.append(
        {**result, "tool_call_id": known["id"], "name": name}
      )
      self.sent.append({**result, "tool_call_id": call["id"]})
    if user or not native:
      for messages in (self.messages, self.sent):
        messages.append({"role": "user", "content": f"u{words}"})

  def text(self, ids):
    """The text of ids, with the one end of a turn that gpt-oss's past has."""
    text = self.renderer.decode(ids)
    if self.renderer.name == "gpt-oss":
      text = text.replace("<|return|>", "<|end|>")
    return text

  def whole(self):
    return whole(self.renderer, self.messages, self.tools)

  def _said(self, calls, reasons, words):
    message = {"role": "assistant", "content": "" if calls else self.mark}
    if reasons:
      message["reasoning_content"] = f"hm{words}"
    if calls:
      message["tool_calls"] = [
        {
          "id": f"functions.calculate:{self.calls + n}",
          "type": "function",
          "function": {
            "name": "calculate",
            "arguments": json.dumps({"expression": f"{n}{words}{self.mark}"}),
          },
        }
        for n in range(calls)
      ]
    ids = sampled(self.renderer, self.messages, message, self.tools)
    if ids is None:
      return message, None
    if "hm" not in self.renderer.decode(ids):  # the family does not write it
      message.pop("reasoning_content", None)
    self.calls += calls
    return message, ids

  def _calls(self, plan, reply, message):
    """The calls that were read, as the client has them and as recorded."""
    meant = [call["function"] for call in message["tool_calls"]]
    assert [(c.name, json.loads(c.arguments)) for c in reply.tool_calls] == [
      (m["name"], json.loads(m["arguments"])) for m in meant
    ]
    sent, kept = [], []
    for n, call in enumerate(reply.tool_calls):
      assert (call.id == message["tool_calls"][n]["id"]) == (
        self.renderer.name in WRITES_IDS
      )
      function = {"name": call.name, "arguments": call.arguments}
      issued = f"call_{plan.number}_{n}"
      value = {"id": issued, "type": "function", "function": function}
      sent.append({**value, "id": f"own_{issued}"})  # some clients change it
      kept.append({**value, call_ids.NATIVE: call.id} if call.id else value)
    return sent, kept


def play(episode, said, *, reasons):
  """Plays the steps; `reasons`: always (True), never, or as they say (None).

  Yields:
    The plan of each request but the first, the text that the model saw and said
    before it, and the text that it sees.
  """
  before = None
  for calls, hm, user, words in [*said, (0, False, False, "")]:
    plan = episode.begin()
    seen = episode.text(plan.prompt_ids)
    if before is not None:
      yield plan, before, seen
    episode.reply(plan, calls, hm if reasons is None else reasons, words)
    node = episode.session.completions()[-1]
    before = seen + episode.text(node.response_ids)
    episode.answer(user, words)


@pytest.mark.parametrize("reasons", [None, False])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, phases=PHASES)
@given(said=steps())
def test_the_model_sees_the_whole_rendering(family, reasons, said):
  """A conversation is a chain exactly where its template lets it be one."""
  episode = Episode(renderer_of(family, reasons is None), [CALCULATE])
  for plan, before, seen in play(episode, said, reasons=reasons):
    assert seen == episode.whole()
    assert (plan.parent is not None) == seen.startswith(before)
    assert plan.fork_reason == (None if plan.parent else "template")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, phases=PHASES)
@given(said=steps())
def test_reasoning_that_is_kept_keeps_the_chain(family, said):
  episode = Episode(renderer_of(family, True, True), [CALCULATE])
  for plan, before, seen in play(episode, said, reasons=True):
    if plan.parent is None:
      assert family in PARTLY and seen == episode.whole()
      continue
    assert seen.startswith(before)
    if families.keeping(None, family, {}) and family not in PARTLY:
      assert seen == episode.whole()
    # What follows the reply is what the template writes after it.
    _, _, after = episode.whole().rpartition(episode.mark)
    assert episode.said_after + seen[len(before) :] == after


@pytest.mark.skipif("gpt-oss" not in FAMILIES, reason="there is no .agents")
def test_a_vocabulary_that_is_missing(monkeypatch, tmp_path):
  tokenizer = tokenizer_of("gpt-oss")
  monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
  with pytest.raises(errors.ConfigError, match="TIKTOKEN_ENCODINGS_BASE"):
    render.Renderer(tokenizer, "gpt-oss")


def what_works(family):
  """A row of the table in docs/gateway.md."""

  def goes_on(step, reasons, keep=False):
    episode = Episode(renderer_of(family, reasons, keep), [CALCULATE])
    [(plan, *_)] = play(episode, [step], reasons=None)
    return plan.parent is not None, "reasoning_content" in episode.sent[2]

  calls = min(2, MOST_CALLS.get(family, 2))
  looped, _ = goes_on((calls, True, False, ""), True)
  plain, _ = goes_on((0, False, True, ""), False)
  asked, reasons = goes_on((0, True, True, ""), True)
  kept, _ = goes_on((0, True, True, ""), True, True)
  constrained = renderer_of(family).call_syntax is not None
  kinds = {True: "chain", False: "root"}
  return (
    f"`{family}`",
    "yes" if reasons else "-",
    str(calls) if calls == 1 else "yes",
    "yes" if constrained else "-",
    kinds[looped],
    kinds[asked if reasons else plain],
    kinds[kept],
  )


def test_the_table_of_families_is_true():
  rows = {f: "| " + " | ".join(what_works(f)) + " |" for f in FAMILIES}
  root = pathlib.Path(__file__).parents[2]
  text = (root / "docs" / "gateway.md").read_text()
  _, _, table = text.partition("| family |")
  lines = [line for line in table.split("\n")[2:] if line.startswith("| `")]
  told = {line.split("`")[1]: line for line in lines}
  assert sorted(told) == sorted({*base.MODEL_RENDERER_MAP.values()})
  told = {family: told[family] for family in FAMILIES}
  assert told == rows, "docs/gateway.md: write\n" + "\n".join(rows.values())
