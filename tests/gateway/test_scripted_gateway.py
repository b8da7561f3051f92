"""The gateway in one call, as a test of an agent would start it."""

import anthropic
import openai
import pytest

from forge_jax import client, errors
from forge_jax.gateway import scripted


def test_one_call_serves_a_script():
  replies = [
    "Hello",
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
  ]
  tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
  with (
    scripted.serve(replies) as gateway,
    client.open_session(gateway.url, gateway.admin_token, "s") as session,
    openai.OpenAI(base_url=session.base_url, api_key=session.api_key) as ask,
  ):
    messages = [{"role": "user", "content": "héllo ☃"}]
    first = ask.chat.completions.create(model="m", messages=messages)
    assert first.choices[0].message.content == "Hello"
    second = ask.chat.completions.create(
      model="m", messages=messages, tools=[tool]
    )
    assert second.choices[0].message.tool_calls[0].function.name == "f"
    with pytest.raises(openai.APIStatusError, match="no reply to 's/2'"):
      ask.with_options(max_retries=0).chat.completions.create(
        model="m", messages=messages
      )
  assert len(session.completions) == 2
  asked = gateway.requests[0].prompt_ids
  assert session.completions[0].prompt_ids.tolist() == list(asked)
  assert gateway.tokenizer.decode(asked) == (
    "<|im_start|>user\nhéllo ☃<|im_end|>\n<|im_start|>assistant\n"
  )


def test_a_function_may_reply_with_ids():
  with (
    scripted.serve(lambda request: [72, 73, 256]) as gateway,
    client.open_session(gateway.url, gateway.admin_token, "s") as session,
    anthropic.Anthropic(base_url=gateway.url, api_key=session.api_key) as ask,
  ):
    reply = ask.messages.create(
      model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}]
    )
    assert reply.stop_reason == "end_turn"
  (completion,) = session.completions
  assert completion.response_ids.tolist() == [72, 73, 256]
  with pytest.raises(errors.GatewayError):
    client.open_session(gateway.url, gateway.admin_token, "t").__enter__()
