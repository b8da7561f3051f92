"""Random episodes whose client distorts its history, in three protocols.

An episode is played twice. The real side: the client's JSON goes through a
dialect, a session, the renderer and a scripted engine, and the reply comes back
as the dialect's JSON. The reference: the client knows which reply each turn of
its history replays and whether it left it recognisable, so that a plain search
over all completions says what a request extends, and a plain writer of ChatML
what the model must see.
"""

import asyncio
import dataclasses
import json

import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax.engine import scripted
from forge_jax.gateway import generation, render, sessions
from forge_jax.gateway import scripted as gateway_scripted
from forge_jax.gateway.dialects import (
  anthropic_messages,
  openai_chat,
  openai_responses,
)

TEMPLATE = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}
{{- call.function.arguments | tojson }}</tool_call>{% endfor %}
{%- if loop.first %}{% for tool in tools or [] %}
{{- '\\n' + tool.function.name }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOKENIZER = gateway_scripted.byte_tokenizer()
TOKENIZER.chat_template = TEMPLATE
RENDERER = render.Renderer(TOKENIZER)
STOP = "<|im_end|>"
WORDS = ("ok", "né", "a\nb", '"q"', "  x", "<b>", "\\n", "1.0", "")


@dataclasses.dataclass
class Said:
  """A message of the client's history, as it is sent this time."""

  role: str
  text: str = ""
  reasoning: str = ""
  calls: tuple = ()  # (id, name, arguments: dict)
  replays: int | None = None  # a completion, if it can be told
  spelling: int = 0  # of the JSON


def tool(name):
  return {"name": name, "description": "", "parameters": {"type": "object"}}


class Chat:
  """The client's side of Chat Completions."""

  dialect = openai_chat

  def body(self, history, tools, rng):
    messages = []
    for said in history:
      text = said.text
      if rng.random() < 0.5 and said.role != "tool":
        text = [{"type": "text", "text": text}]
      message = {"role": said.role, "content": text}
      if said.role == "tool":
        message["tool_call_id"] = said.calls[0][0]
      elif said.calls:
        message["tool_calls"] = [
          {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": spelt(value, said)},
          }
          for id, name, value in said.calls
        ]
      if said.reasoning:
        names = ("reasoning_content", "reasoning", "reasoning_text")
        message[rng.choice(names)] = said.reasoning
      messages.append(message)
    listed = [{"type": "function", "function": tool(name)} for name in tools]
    return {"model": "m", "messages": messages, "tools": listed}

  def read(self, reply):
    message = reply["choices"][0]["message"]
    calls = tuple(
      (c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
      for c in message.get("tool_calls") or ()
    )
    return Said(
      "assistant",
      message["content"] or "",
      message.get("reasoning_content", ""),
      calls,
    )


class Messages:
  """The client's side of Messages."""

  dialect = anthropic_messages

  def body(self, history, tools, rng):
    billing = f"x-anthropic-billing-header: cch={rng.random()};"
    system = [{"type": "text", "text": billing}]
    system.append({"type": "text", "text": history[0].text})
    messages = []
    for said in history[1:]:
      role, blocks = said.role, []
      if said.reasoning:
        thinking = {"type": "thinking", "thinking": said.reasoning}
        blocks.append({**thinking, "signature": ""})
      if role == "tool":
        role = "user"
        result = {"type": "tool_result", "content": said.text}
        blocks.append({**result, "tool_use_id": said.calls[0][0]})
      else:
        if said.text:
          blocks.append({"type": "text", "text": said.text})
        blocks += [
          {"type": "tool_use", "id": id, "name": name, "input": value}
          for id, name, value in said.calls
        ]
      if blocks and rng.random() < 0.3:
        blocks[-1]["cache_control"] = {"type": "ephemeral"}
      plain = blocks == [{"type": "text", "text": said.text}]
      content = said.text if plain and rng.random() < 0.5 else blocks
      messages.append({"role": role, "content": content})
    listed = [
      {"name": name, "description": "", "input_schema": {"type": "object"}}
      for name in tools
    ]
    return {
      "model": "m",
      "max_tokens": 4096,
      "system": system,
      "messages": messages,
      "tools": listed,
    }

  def read(self, reply):
    said = Said("assistant")
    for block in reply["content"]:
      if block["type"] == "text":
        said.text = block["text"]
      elif block["type"] == "thinking":
        said.reasoning = block["thinking"]
      else:
        call = (block["id"], block["name"], block["input"])
        said.calls = (*said.calls, call)
    return said


class Responses:
  """The client's side of Responses, with the whole input each time."""

  dialect = openai_responses

  def body(self, history, tools, rng):
    items = []
    for said in history[1:]:
      if said.reasoning:
        part = {"type": "reasoning_text", "text": said.reasoning}
        items.append({"type": "reasoning", "summary": [], "content": [part]})
      if said.role == "tool":
        output = {"type": "function_call_output", "output": said.text}
        items.append({**output, "call_id": said.calls[0][0]})
        continue
      if said.text or not said.calls:
        kind = "output_text" if said.role == "assistant" else "input_text"
        text = [{"type": kind, "text": said.text}]
        content = said.text if rng.random() < 0.5 else text
        items.append({"role": said.role, "content": content})
      items += [
        {
          "type": "function_call",
          "call_id": id,
          "name": name,
          "arguments": spelt(value, said),
        }
        for id, name, value in said.calls
      ]
    listed = [{"type": "function", "strict": False, **tool(n)} for n in tools]
    return {
      "model": "m",
      "instructions": history[0].text,
      "input": items,
      "tools": listed,
    }

  def read(self, reply):
    said = Said("assistant")
    for item in reply["output"]:
      if item["type"] == "message":
        said.text = item["content"][0]["text"]
      elif item["type"] == "reasoning":
        said.reasoning = item["content"][0]["text"]
      else:
        call = (item["call_id"], item["name"], json.loads(item["arguments"]))
        said.calls = (*said.calls, call)
    return said


def spelt(value, said):
  """A call's arguments in one of the spellings of JSON."""
  if said.spelling == 1:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
  return json.dumps(value, indent=said.spelling or None)


def distort(said, rng, number):
  """A replayed turn as a client might send it, still to be recognised."""
  said = dataclasses.replace(said, spelling=rng.randrange(3))
  if rng.random() < 0.3:
    said.calls = tuple(
      (*c[:2], dict(reversed(c[2].items()))) for c in said.calls
    )
  if rng.random() < 0.3:
    said.reasoning = rng.choice(("", said.reasoning.strip()))
  if rng.random() < 0.3:
    said.text = rng.choice((said.text.strip(), said.text + "\n"))
  if said.calls and rng.random() < 0.3:
    said.text = ""
  if said.calls and rng.random() < 0.3:  # the client's own ids
    said.calls = tuple((f"own_{number}_{c[0]}", *c[1:]) for c in said.calls)
  elif said.calls and rng.random() < 0.3:  # a default
    said.calls = tuple((*c[:2], {**c[2], "all": False}) for c in said.calls)
  return said


def change(said, rng):
  """A replayed turn that has become another."""
  if said.calls and rng.random() < 0.5:
    calls = tuple((*c[:2], {**c[2], "n": -1}) for c in said.calls)
    return dataclasses.replace(said, calls=calls, replays=None)
  return dataclasses.replace(said, text=said.text + " (edited)", replays=None)


def scripted_reply(rng, number):
  """What the model samples: unlike every other reply."""
  text = rng.choice(WORDS) + f" {number}"
  if rng.random() < 0.4:
    text = f"<think>\n{rng.choice(WORDS)} {number}\n</think>\n\n{text}"
  for _ in range(rng.choice((0, 0, 1, 2))):
    arguments = {"n": number, "text": rng.choice(WORDS), "x": 2.0}
    if rng.random() < 0.2:
      text += "\n<tool_call>\n{broken\n</tool_call>"
    else:
      # As no template would write it.
      value = json.dumps({"arguments": arguments, "name": "f"}, indent=1)
      text += f"\n<tool_call>\n{value}\n</tool_call>"
  cut = rng.random() < 0.15
  return TOKENIZER.encode(text) + ([] if cut else [TOKENIZER.eos_token_id])


class Reference:
  """What a request must extend, and what its model must see."""

  def __init__(self):
    self.nodes = []  # (keys of request and reply, tools, text up to its end)

  def ask(self, history, tools):
    """(the number of the completion to extend or None, the prompt)."""
    keys = [self._key(said) for said in history]
    fits = [
      (len(node), number)
      for number, (node, with_tools, _) in enumerate(self.nodes)
      if with_tools == tools and keys[: len(node)] == node
    ]
    depth, parent = max(fits, default=(0, None))
    prompt = self.nodes[parent][2] if depth else ""
    for n in range(depth, len(history)):
      prompt += write(history[n], () if n else tools)
    return parent, prompt + "<|im_start|>assistant\n"

  def in_place(self, history, said):
    """Whether what a turn replays was said after this very history."""
    keys, _, _ = self.nodes[said.replays]
    return keys[:-1] == [self._key(before) for before in history]

  def record(self, history, tools, prompt, sampled):
    keys = [self._key(said) for said in history] + [len(self.nodes)]
    closed = sampled if sampled.endswith(STOP) else sampled + STOP
    self.nodes.append((keys, tools, prompt + closed + "\n"))

  def _key(self, said):
    if said.replays is not None:
      return said.replays
    calls = [(name, json.dumps(v, sort_keys=True)) for _, name, v in said.calls]
    if said.role == "tool":
      calls = []
    reasoning = said.reasoning if said.role == "assistant" else ""
    return (said.role, said.text, reasoning, str(calls))


def write(said, tools=()):
  """A message as the template writes it."""
  text = said.text
  if said.reasoning:
    text = f"<think>{said.reasoning}</think>{text}"
  for _, name, value in said.calls if said.role == "assistant" else ():
    call = name + json.dumps(value, ensure_ascii=False)
    text += f"<tool_call>{call}</tool_call>"
  text += "".join("\n" + name for name in tools)
  return f"<|im_start|>{said.role}\n{text}{STOP}\n"


class Episode:
  """Plays both sides."""

  def __init__(self, client, rng):
    self._client = client
    self._rng = rng
    self._reference = Reference()
    self._prompts = {}
    self._sampled = []
    self._engine = scripted.ScriptedEngine(self._sample, max_context=2**20)
    self.session = sessions.Session("s", seed=0, sampling={})
    self.changed = False  # whether the client did what no matching survives
    self._fresh()

  def _sample(self, request):
    self._prompts[request.id] = list(request.prompt_ids)
    return self._sampled[-1]

  def _fresh(self):
    self._tools = ("f",)
    self._history = [Said("system", "Be brief.")]
    self._history.append(Said("user", f"Task {len(self._sampled)}."))

  async def step(self):
    """The client does something to its history, asks, and goes on."""
    rng, number = self._rng, len(self._sampled)
    self._alter()
    sent = []
    for said in self._history:
      if said.replays is not None:
        if self._reference.in_place(sent, said):
          said = distort(said, rng, number)
        else:  # it stands in another history: a message like any other
          said = dataclasses.replace(said, replays=None)
      sent.append(said)
    parent, prompt = self._reference.ask(sent, self._tools)
    sampled = scripted_reply(rng, number)
    self._sampled.append(sampled)
    said = await self._ask(self._client.body(sent, self._tools, rng))
    completion = self.session.completions()[number]
    assert completion.response_ids.tolist() == sampled
    assert completion.prompt_ids.tolist() == self._prompts[f"s/{number}"]
    assert text(completion.prompt_ids) == prompt
    assert completion.parent == (None if parent is None else f"s/{parent}")
    self._reference.record(sent, self._tools, prompt, text(sampled))
    said.replays = number
    self._history.append(said)
    for call in said.calls:
      self._history.append(Said("tool", rng.choice(WORDS), calls=(call,)))
    if not said.calls or rng.random() < 0.2:
      self._history.append(Said("user", f"Go on {number}."))

  async def _ask(self, body):
    asked = self._client.dialect.parse(body, self.session)
    async with generation.Generation(
      self._engine, RENDERER, self.session, asked.turns[0]
    ) as generated:
      async for _ in generated.deltas(False):
        pass
      return self._client.read(json.loads(asked.reply([generated], RENDERER)))

  def _alter(self):
    rng, history = self._rng, self._history
    replays = [n for n, said in enumerate(history) if said.replays is not None]
    what = rng.randrange(12)
    if what == 0 and replays:  # a rewind: a branch
      del history[rng.choice(replays) + 1 :]
      history.append(Said("user", f"Instead {len(self._sampled)}."))
    elif what == 1:  # a sub-agent, or a compaction
      self._fresh()
    elif what == 2 and replays:
      at = rng.choice(replays)
      history[at] = change(history[at], rng)
      self.changed = True
    elif what == 3 and replays:  # the latest turn, and what it led to
      del history[replays[-1] :]
      history.append(Said("user", f"Malformed {len(self._sampled)}."))
      self.changed = True
    elif what == 4:
      at = rng.randrange(len(self._tools) + 1)
      name = f"tool{len(self._sampled)}"
      self._tools = (*self._tools[:at], name, *self._tools[at:])
      self.changed = True


def text(ids):
  return RENDERER.decode(list(ids))


@pytest.mark.parametrize("client", [Chat(), Messages(), Responses()])
@hypothesis.settings(max_examples=60)
@hypothesis.given(
  rng=st.randoms(use_true_random=False), steps=st.integers(1, 12)
)
def test_trained_is_what_was_sampled_and_seen_what_was_sent(client, rng, steps):
  async def play():
    episode = Episode(client, rng)
    for _ in range(steps):
      await episode.step()
    if not episode.changed:
      assert not episode.session.fork_reasons

  asyncio.run(play())
