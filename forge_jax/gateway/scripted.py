"""A gateway that plays a script: one call, for tests of agents and harnesses.

  with scripted.serve(["first reply", "<tool_call>...</tool_call>"]) as gateway:
    with client.open_session(gateway.url, gateway.admin_token, "s") as session:
      ...  # any agent, told session.base_url and session.api_key

It is the real gateway, on a thread of its own, in front of an engine that says
what it is told. It needs no model, no accelerator and no network but loopback.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import threading
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
import transformers

from forge_jax import errors
from forge_jax.engine import api, scripted
from forge_jax.gateway import server

# In the manner of Qwen3: ChatML, tools in the system turn, calls as JSON.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -}}
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' -%}
<|im_start|>assistant
{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '\\n' if m.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{
  call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif %}"""
CHAT_MARKERS = (
  "<tool_call>",
  "</tool_call>",
  "<tool_response>",
  "</tool_response>",
  "<think>",
  "</think>",
)
_START, _END = "<|im_start|>", "<|im_end|>"

Reply = str | Sequence[int]
# Replies in the order of requests, or what to say to each.
Script = Iterable[Reply] | Callable[[api.GenerateRequest], Reply]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ScriptedGateway:
  """A gateway that is being served."""

  url: str
  admin_token: str
  tokenizer: transformers.PreTrainedTokenizerFast
  requests: list[api.GenerateRequest]  # that the engine has had, in order
  engine: scripted.ScriptedEngine


@contextlib.contextmanager
def serve(
  script: Script,
  *,
  tokenizer: transformers.PreTrainedTokenizerFast | None = None,
  config: server.GatewayConfig | None = None,
  delay: float = 0.0,
  max_context: int = 2**20,
) -> Iterator[ScriptedGateway]:
  """Serves a gateway for the length of a block.

  Args:
    script: the replies, request by request, or a function that is given each
      request and returns one. A reply is a text, which ends with the stop
      token, or token ids as they are to be sampled. A request after the last
      reply is answered with an error of the engine.
    tokenizer: of the model that is played; None: `byte_tokenizer`.
    config: of the gateway; None: a free port of 127.0.0.1, a random token.
    delay: seconds before each token; 0 gives a whole reply at once.
    max_context: most tokens of prompt and response.

  Raises:
    GatewayError: the address cannot be listened on.
    ConfigError: the configuration cannot work.
  """
  tokenizer = tokenizer or byte_tokenizer()
  requests: list[api.GenerateRequest] = []
  next_reply = script if callable(script) else _in_order(script)

  def reply(request: api.GenerateRequest) -> Sequence[int]:
    requests.append(request)
    said = next_reply(request)
    if not isinstance(said, str):
      return said
    ids = tokenizer.encode(said, add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id]

  engine = scripted.ScriptedEngine(
    reply, max_context=max_context, delay=delay, decode=tokenizer.decode
  )
  gateway = server.Gateway(engine, tokenizer, config)
  with running(gateway):
    yield ScriptedGateway(
      gateway.url, gateway.admin_token, tokenizer, requests, engine
    )


@contextlib.contextmanager
def running(gateway: server.Gateway) -> Iterator[None]:
  """Serves a gateway, on a thread of its own, for the length of a block.

  Raises:
    GatewayError: the address cannot be listened on.
  """
  with _loop_on_a_thread() as call:
    call(gateway.start())
    try:
      yield
    finally:
      call(gateway.stop())


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """A tokenizer with a token for each byte, and a template with tools."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: n for n, letter in enumerate(alphabet)}
  backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token=_END, chat_template=CHAT_TEMPLATE
  )
  tokenizer.add_tokens(
    [
      AddedToken(_START, special=True, normalized=False),
      *(
        AddedToken(marker, special=False, normalized=False)
        for marker in CHAT_MARKERS
      ),
    ]
  )
  return tokenizer


def _in_order(
  replies: Iterable[Reply],
) -> Callable[[api.GenerateRequest], Reply]:
  rest = iter(replies)

  def reply(request: api.GenerateRequest) -> Reply:
    for said in rest:
      return said
    raise errors.EngineError(f"the script has no reply to {request.id!r}")

  return reply


@contextlib.contextmanager
def _loop_on_a_thread() -> Iterator[Callable[[Coroutine], Any]]:
  """An asyncio loop on a thread; yields what runs a coroutine on it."""
  loop = asyncio.new_event_loop()
  thread = threading.Thread(target=loop.run_forever, daemon=True)
  thread.start()
  try:
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(
      coroutine, loop
    ).result()
  finally:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
