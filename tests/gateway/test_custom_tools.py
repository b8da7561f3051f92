"""Custom tools: their grammars, and Chat Completions through the SDK."""

import json

from family_models import renderer_of
import openai
import pytest

from forge_jax import errors
from forge_jax.engine import grammar as engine_grammar
from forge_jax.gateway import constraint, render
from forge_jax.gateway.dialects import openai_chat

CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
# That of Codex's apply_patch, but for two of its rules.
PATCH = r"""start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: add | delete
add: "*** Add File: " filename LF line+
delete: "*** Delete File: " filename LF
filename: /(.+)/
line: "+" /(.*)/ LF -> line
%import common.LF
"""


def custom(name, **format):
  tool = {"name": name, "description": "Edits."}
  if format:
    tool["format"] = {"type": "grammar", "grammar": format}
  return {"type": "custom", "custom": tool}


TOOLS = [
  custom("patch", syntax="lark", definition=PATCH),
  custom("code", syntax="regex", definition="[ab]{3}"),
  custom("say"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_keep_what_was_sampled(start, tool_tokenizer, stream):
  h = await start(tool_tokenizer)
  keys = await h.open()
  odd = '{"input": 3, "file":  "x"}'
  h.say(
    CALL % ("say", '{"input":  "line\\n\\"q\\""}'),
    CALL % ("say", odd),
    CALL % ("patch", '{"input": "x"}'),
    "done",
  )
  messages, calls = [{"role": "user", "content": "go"}], []
  async with openai.AsyncOpenAI(
    api_key=keys.api_key, base_url=keys.base_url, max_retries=0
  ) as client:
    for _ in range(4):
      body = {"model": "m", "messages": messages, "tools": TOOLS[::2]}
      if stream:
        chunks = await client.chat.completions.create(stream=True, **body)
        deltas = [c.choices[0].delta async for c in chunks]
        made = [c.to_dict() for d in deltas for c in d.tool_calls or ()]
        text = "".join(d.content or "" for d in deltas)
        made = [{k: c[k] for k in c if k != "index"} for c in made]
        message = {"role": "assistant", "content": text, "tool_calls": made}
      else:
        reply = await client.chat.completions.create(**body)
        message = reply.choices[0].message.to_dict()
        made = message.get("tool_calls") or []
      calls += made
      messages.append({k: v for k, v in message.items() if v})
      messages += [
        {"role": "tool", "tool_call_id": call["id"], "content": "ok"}
        for call in made
      ]
  assert [call["type"] for call in calls] == ["custom"] * 3
  assert calls[0]["custom"] == {"name": "say", "input": 'line\n"q"'}
  assert json.loads(calls[1]["custom"]["input"]) == json.loads(odd)
  assert calls[2]["custom"] == {"name": "patch", "input": "x"}
  completions, _ = await h.admin.close_session("s")
  parents = [completion.parent for completion in completions]
  assert parents == [None, "s/0", "s/1", "s/2"]
  prompt = h.text(completions[0].prompt_ids)
  assert "*** Begin Patch" in prompt and '"input"' in prompt


@pytest.mark.parametrize(
  ("tool", "where"),
  [
    ({"type": "custom"}, "tools[0].custom"),
    ({"type": "custom", "custom": {}}, "tools[0].custom.name"),
    (
      {"type": "custom", "custom": {"name": "x", "format": {"type": "xml"}}},
      "tools[0].custom.format.type",
    ),
    (
      custom("x", syntax="bnf", definition="x"),
      "tools[0].custom.format.grammar.syntax",
    ),
    (
      custom("x", syntax="lark"),
      "tools[0].custom.format.grammar.definition",
    ),
    ({"type": "web_search"}, "tools[0]"),
  ],
)
async def test_malformed_tools_are_named(start, tool_tokenizer, tool, where):
  h = await start(tool_tokenizer)
  body = {"messages": [{"role": "user", "content": "go"}], "tools": [tool]}
  status, reply = await h.post(await h.open(), body)
  assert (status, reply["error"]["param"]) == (400, where)


def made(family, **body):
  """The grammar of a reply to a request with custom tools, and a checker."""
  renderer = renderer_of(family)
  turn = openai_chat.parse(
    {
      "model": "m",
      "messages": [{"role": "user", "content": "go"}],
      "tools": TOOLS,
      **body,
    }
  ).turns[0]
  constraint.check(turn.constraint, renderer, turn.tools)
  prompt = renderer.render(turn.messages, turn.tools).ids
  grammar = constraint.grammar(turn.constraint, renderer, prompt, turn.tools)
  tokenizer = renderer._tokenizer
  grammars = engine_grammar.Grammars(tokenizer, len(tokenizer))
  return grammar, lambda text: grammars.follows(
    grammar.text, tokenizer.encode(text, add_special_tokens=False), True
  )


@pytest.mark.parametrize(
  ("family", "before", "after"),
  [
    (
      "qwen3.5",
      "</think>\n\n<tool_call>\n<function=patch>\n<parameter=input>\n",
      "\n</parameter>\n</function>\n</tool_call>",
    ),
    (
      "minimax-m2",
      '</think>\n\n<minimax:tool_call>\n<invoke name="patch">\n'
      '<parameter name="input">',
      "</parameter>\n</invoke>\n</minimax:tool_call>",
    ),
    (
      "deepseek-v4",
      '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="patch">\n'
      '<｜DSML｜parameter name="input" string="true">',
      "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    ),
  ],
)
def test_lark_is_enforced_on_bare_texts(family, before, after):
  _, follows = made(family)
  good = "*** Begin Patch\n*** Add File: a.py\n+print('</b>')\n+\n"
  good += "*** End Patch"
  assert follows(f"{before}{good}{after}")
  assert not follows(f"{before}{good.replace('*** End', '** End')}{after}")
  assert not follows(f"{before}{good.replace('+print', 'print')}{after}")
  end = "</think>\n\n" if "</think>" in before else ""
  assert follows(f"{end}No call.")


def test_lark_is_told_where_texts_are_json():
  grammar, _ = made("qwen3", tools=[TOOLS[0], TOOLS[2]])
  assert grammar is None
  grammar, follows = made("qwen3")  # for the regular expression's sake
  assert follows(CALL % ("code", '{"input": "abb"}'))
  assert not follows(CALL % ("code", '{"input": "abc"}'))
  assert follows(CALL % ("patch", '{"input": "any"}'))


def test_a_grammar_that_is_none_is_blamed_on_the_tools():
  bad = custom("patch", syntax="lark", definition="start: begin\nbegin: (")
  grammar, follows = made("qwen3.5", tools=[bad])
  with pytest.raises(errors.GrammarError) as caught:
    follows("x")
  refused = grammar.refuse(caught.value)
  assert refused.param == "tools" and "'patch'" in str(refused)


def test_a_family_whose_calls_are_not_known_is_told(smollm2):
  renderer = render.Renderer(smollm2)
  wanted = constraint.Constraint(lark={"patch": {"input": PATCH}})
  constraint.check(wanted, renderer, ())
  assert constraint.grammar(wanted, renderer, [], ()) is None
