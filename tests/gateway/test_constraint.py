"""Grammars of replies: what follows them is read back as what was demanded."""

import copy
import json
import re

import family_models
from hypothesis import given, settings
from hypothesis import strategies as st
import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken

from forge_jax import errors
from forge_jax.engine import grammar as engine_grammar
from forge_jax.gateway import constraint, refusal, render

MESSAGES = [{"role": "user", "content": "Go."}]
SHORT = {"type": "string", "maxLength": 4}
# By a vocabulary of words; every other family by one of bytes.
OF_WORDS = ("default", "qwen3", "qwen3.5")
UNKNOWN = {"gemma4"}
FAMILIES = [
  "default",
  *(f for f in family_models.FAMILIES if f not in UNKNOWN),
]


def tool(name, properties, required=None, **more):
  parameters = {
    "type": "object",
    "properties": properties,
    "required": sorted(properties) if required is None else required,
    "additionalProperties": False,
  }
  function = {"name": name, "parameters": parameters, **more}
  return {"type": "function", "function": function}


TOOLS = [
  tool(
    "look_up",
    {
      "place": {"type": "string", "enum": ["Rome", "São Tomé"]},
      "days": {"type": "integer", "minimum": 0, "maximum": 99},
      "exact": {"type": "boolean"},
    },
    ["place", "days"],
  ),
  tool("stop", {}),
  tool(
    "tag",
    {"labels": {"type": "array", "items": SHORT, "maxItems": 2}},
  ),
]


class Model:
  """A family's renderer, and grammars over its vocabulary."""

  def __init__(self, tokenizer, name):
    self.tokenizer = tokenizer
    self.renderer = render.Renderer(tokenizer, name)
    self.grammars = engine_grammar.Grammars(tokenizer, len(tokenizer) + 3)

  def prompt(self, tools):
    return self.renderer.render(MESSAGES, tools).ids

  def reply(self, wanted, tools, seed, *, think=0.5, most=1500):
    """A reply drawn from what is allowed, parsed; and its text."""
    constraint.check(wanted, self.renderer, tools)
    prompt = self.prompt(tools)
    made = constraint.grammar(wanted, self.renderer, prompt, tools)
    ids = self.walk(made.text, seed, think, most)
    stop = self.renderer.stop_token_ids[0]
    reply = self.renderer.parse(prompt, [*ids, stop], tools)
    return reply, self.renderer.decode(ids)

  def walk(self, text, seed, think, most):
    rng = np.random.default_rng(seed)
    stops = set(self.renderer.stop_token_ids)
    # Free text ends soon, and the reasoning of a walk is short.
    hurry = {*self.renderer.special.values(), *self.tokenizer.encode("{\n<")}
    ids = []
    progress = self.grammars.start(text, tuple(stops))
    while len(ids) < most:
      bits = np.unpackbits(progress.allowed.view(np.uint8), bitorder="little")
      some = np.flatnonzero(bits)
      go_on = some[~np.isin(some, list(stops))]
      if len(go_on) < len(some) and (not len(go_on) or rng.random() < think):
        return ids
      close = self.renderer.think_close_id
      if close in go_on and rng.random() < think:
        go_on = [close]
      elif rng.random() < think:
        go_on = [t for t in go_on if t in hurry] or go_on
      ids.append(int(rng.choice(go_on)))
      engine_grammar.advance([progress], ids[-1:])
      assert progress.error is None
    raise AssertionError("the walk does not end")


@pytest.fixture(scope="module")
def models(tool_tokenizer, smollm2):
  made = {}

  def model(name):
    if name not in made:
      made[name] = Model(vocabulary(name), name)
    return made[name]

  def vocabulary(name):
    markers = ()
    if name != "default":
      markers = family_models.tokenizer_of(name).get_added_vocab()
      markers = sorted(markers, key=markers.get)
    if name == "llama-3":  # it has no tokens for reasoning
      markers = [marker for marker in markers if "think" not in marker]
    elif name not in OF_WORDS:
      return family_models.tokenizer_of(name)
    tokenizer = copy.deepcopy(smollm2 if name == "llama-3" else tool_tokenizer)
    tokenizer.add_tokens(
      [AddedToken(m, special=False, normalized=False) for m in markers]
    )
    return tokenizer

  return model


def check_call(call, tools=TOOLS):
  """The call is of a tool and follows its schema."""
  [found] = [t["function"] for t in tools if t["function"]["name"] == call.name]
  jsonschema.validate(json.loads(call.arguments), found["parameters"])


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), once=st.booleans())
def test_a_demanded_call_is_read_back(models, name, seed, once):
  wanted = constraint.Constraint(must_call=True, once=once)
  reply, said = models(name).reply(wanted, TOOLS, seed)
  assert reply.tool_calls and not reply.malformed, said
  assert reply.content.strip() == ""
  assert len(reply.tool_calls) == 1 or not once
  for call in reply.tool_calls:
    check_call(call)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_named_tool_is_the_one_that_is_called(models, name, seed):
  wanted = constraint.Constraint(
    must_call=True, only=frozenset({"stop"}), once=True
  )
  reply, said = models(name).reply(wanted, TOOLS, seed)
  assert [call.name for call in reply.tool_calls] == ["stop"], said
  assert reply.tool_calls[0].arguments == "{}"


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_of_strict_tools_follow_their_schema(models, name):
  strict = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
  wanted = constraint.Constraint(strict=strict)
  kinds = set()
  for seed in range(6 if name == "gpt-oss" else 25):  # its vocabulary is large
    reply, said = models(name).reply(wanted, TOOLS, seed, think=0.3)
    kinds.add(bool(reply.tool_calls))
    assert not reply.malformed, said
    for call in reply.tool_calls:
      check_call(call)
  if name != "deepseek-v4":  # chance hardly finds how its calls begin
    assert kinds == {True, False}  # the model may call, and need not


def test_calls_that_begin_with_a_text(models):
  model = models("deepseek-v4")
  strict = {"stop": TOOLS[1]["function"]["parameters"]}
  wanted = constraint.Constraint(strict=strict)
  prompt = model.prompt(TOOLS)
  made = constraint.grammar(wanted, model.renderer, prompt, TOOLS)
  call = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="stop">\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
  )
  for text in ("", "Hi.", "<b>Hi</b>\n\n"):
    ids = model.tokenizer.encode(text + call, add_special_tokens=False)
    assert model.grammars.follows(made.text, ids, True)
    stop = model.renderer.stop_token_ids[0]
    reply = model.renderer.parse(prompt, [*ids, stop], TOOLS)
    assert (reply.content, len(reply.tool_calls)) == (text.strip(), 1)
  wrong = model.tokenizer.encode("Hi." + call[2:], add_special_tokens=False)
  assert not model.grammars.follows(made.text, wrong, True)


@pytest.mark.parametrize("name", FAMILIES)
def test_content_follows_its_schema(models, name):
  schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["n"],
    "additionalProperties": False,
  }
  wanted = constraint.Constraint(schema=schema)
  for seed in range(8):
    reply, said = models(name).reply(wanted, (), seed)
    assert not reply.tool_calls, said
    jsonschema.validate(json.loads(reply.content), schema)


def test_content_of_a_schema_or_calls(models):
  wanted = constraint.Constraint(schema={"enum": ["yes", "no"]})
  kinds = set()
  for seed in range(20):
    reply, _ = models("qwen3").reply(wanted, TOOLS, seed)
    kinds.add(bool(reply.tool_calls))
    if not reply.tool_calls:
      assert json.loads(reply.content) in ("yes", "no")
    for call in reply.tool_calls:
      check_call(call)
  assert kinds == {True, False}


def test_the_model_reasons_freely_first(models):
  model = models("qwen3.5")
  prompt = model.prompt(TOOLS)
  wanted = constraint.Constraint(must_call=True, only=frozenset({"stop"}))
  made = constraint.grammar(wanted, model.renderer, prompt, TOOLS)
  follows = lambda text: model.grammars.follows(
    made.text, model.tokenizer.encode(text, add_special_tokens=False), True
  )
  call = "<tool_call>\n<function=stop>\n</function>\n</tool_call>"
  assert model.renderer.opens_reasoning(prompt)
  assert follows(f'Hm, "{{" or <|im_start|>?\n</think>\n\n{call}')
  assert not follows(call)
  assert not follows(f"Hm. {call}")
  closed = [*prompt, *model.tokenizer.encode("</think>\n\n")]
  made = constraint.grammar(wanted, model.renderer, closed, TOOLS)
  assert follows(call) and not follows(f"Hm.</think>\n\n{call}")


def test_strings_without_quotes_may_hold_anything_or_what_they_must(models):
  strict = {
    "type": "object",
    "properties": {
      "text": {"type": "string", "description": "free"},
      "code": {"type": "string", "pattern": "^[a-c]/\\d{2}$"},
      "size": {"$ref": "#/$defs/size"},
    },
    "required": ["text", "code", "size"],
    "$defs": {"size": {"type": "integer", "minimum": 1, "maximum": 3}},
  }
  tools = [
    {"type": "function", "function": {"name": "write", "parameters": strict}}
  ]
  wanted = constraint.Constraint(must_call=True, strict={"write": strict})
  for name in ("qwen3.5", "glm-5", "minimax-m2"):
    model = models(name)
    closed = [*model.prompt(tools), *model.tokenizer.encode("</think>\n\n")]
    made = constraint.grammar(wanted, model.renderer, closed, tools)
    said = _written(name, {"text": 'a "b"\n<c> {', "code": "b/07", "size": "2"})
    ids = model.tokenizer.encode(said, add_special_tokens=False)
    assert model.grammars.follows(made.text, ids, True), said
    stop = model.renderer.stop_token_ids[0]
    [call] = model.renderer.parse(closed, [*ids, stop], tools).tool_calls
    assert json.loads(call.arguments) == {
      "text": 'a "b"\n<c> {',
      "code": "b/07",
      "size": 2,
    }
    for wrong in ({"code": "d/07"}, {"code": "b/7"}, {"size": "4"}):
      values = {"text": "a", "code": "b/07", "size": "2", **wrong}
      ids = model.tokenizer.encode(
        _written(name, values), add_special_tokens=False
      )
      assert not model.grammars.follows(made.text, ids, True), wrong


def _written(name, values):
  if name == "qwen3.5":
    pairs = "".join(
      f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items()
    )
    return f"<tool_call>\n<function=write>\n{pairs}</function>\n</tool_call>"
  if name == "glm-5":
    pairs = "".join(
      f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>"
      for k, v in values.items()
    )
    return f"<tool_call>write{pairs}</tool_call>"
  pairs = "".join(
    f'<parameter name="{k}">{v}</parameter>\n' for k, v in values.items()
  )
  return (
    f'<minimax:tool_call>\n<invoke name="write">\n{pairs}</invoke>\n'
    "</minimax:tool_call>"
  )


@pytest.mark.parametrize(
  ("wanted", "param", "message"),
  [
    ({"must_call": True, "only": frozenset({"f"})}, "tool_choice", "'f'"),
    ({"must_call": True}, "tool_choice", "no tools"),
  ],
)
def test_a_choice_of_tools_that_are_not_there(models, wanted, param, message):
  with pytest.raises(refusal.Refusal, match=message) as caught:
    constraint.check(
      constraint.Constraint(**wanted), models("qwen3").renderer, ()
    )
  assert caught.value.param == param


@pytest.mark.parametrize(
  ("wanted", "param"),
  [
    ({"must_call": True}, "tool_choice"),
    ({"strict": {"stop": {}}}, "tools"),
    ({"schema": {}, "schema_param": "text.format"}, "text.format"),
  ],
)
def test_an_unknown_family_is_named(smollm2, wanted, param):
  renderer = render.Renderer(smollm2)  # its template knows no calls
  with pytest.raises(refusal.Refusal, match="family 'default'") as caught:
    constraint.check(constraint.Constraint(**wanted), renderer, TOOLS)
  assert caught.value.param == param


@pytest.mark.parametrize(
  ("wanted", "tools", "param", "message"),
  [
    (
      {"schema": {"type": "integr"}, "schema_param": "text.format"},
      (),
      "text.format",
      "the schema: .*Invalid type: integr",
    ),
    (
      {"must_call": True},
      [tool("a", {}), tool("b", {"x": {"type": "strin"}})],
      "tools",
      "the parameters of 'b': .*Invalid type: strin",
    ),
    (
      {"strict": {"b": {"properties": {"x": {"not": {}}}}}},
      [tool("b", {"x": {"not": {}}})],
      "tools",
      r"the parameters of 'b': .*Unimplemented keys: .*not",
    ),
  ],
)
def test_what_the_engine_refuses_is_named(
  models, wanted, tools, param, message
):
  model = models("qwen3")
  made = constraint.grammar(
    constraint.Constraint(**wanted), model.renderer, [], tools
  )
  with pytest.raises(errors.GrammarError) as caught:
    model.grammars.start(made.text, model.renderer.stop_token_ids)
  refused = made.refuse(caught.value)
  assert refused.param == param
  assert not [line for line in str(refused).split("\n") if "rule_" in line]
  assert re.search(message, str(refused)), str(refused)


def test_keywords_that_are_unknown_matter_to_strict_tools_only(models):
  tools = [tool("b", {"x": {"type": "string", "not": {}, "maxLength": 3}})]
  wanted = constraint.Constraint(must_call=True, once=True)
  reply, _ = models("qwen3").reply(wanted, tools, 0)
  assert len(json.loads(reply.tool_calls[0].arguments)["x"]) <= 3


def test_nothing_demanded_is_no_grammar(models):
  renderer = models("qwen3").renderer
  constraint.check(constraint.FREE, renderer, TOOLS)
  assert constraint.grammar(constraint.FREE, renderer, [], TOOLS) is None
  once = constraint.Constraint(once=True)
  assert constraint.grammar(once, renderer, [], TOOLS) is None
