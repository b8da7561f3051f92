"""Masks of grammars: what may come next, and how a response ends."""

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import jsonschema
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.engine import grammar

STOP, CALL = 256, 257


@pytest.fixture(scope="module")
def grammars(byte_tokenizer):
  return grammar.Grammars(byte_tokenizer, 260)


def allowed(progress):
  bits = np.unpackbits(progress.allowed.view(np.uint8), bitorder="little")
  return np.flatnonzero(bits).tolist()


def walk(progress, rng, stop=STOP, most=2000):
  """Tokens drawn evenly from what is allowed, until the stop token."""
  tokens = []
  while len(tokens) < most:
    some = allowed(progress)
    assert some and max(some) < 260
    if stop in some and (len(some) == 1 or rng.random() < 0.2):
      return tokens
    tokens.append(int(rng.choice([t for t in some if t != stop])))
    grammar.advance([progress], tokens[-1:])
    assert progress.error is None
  raise AssertionError("the walk does not end")


def test_a_walk_spells_what_the_grammar_says(grammars, byte_tokenizer):
  text = 'start: "a"+ <[257]> /[0-9]{2}/ ("x" | "é")'
  for seed in range(20):
    tokens = walk(grammars.start(text, [STOP]), np.random.default_rng(seed))
    said = byte_tokenizer.decode(tokens)
    assert re.fullmatch(r"a+<\|call\|>[0-9]{2}(x|é)", said), said


def test_only_the_requests_stop_tokens_end_it_and_only_at_an_end(grammars):
  one = grammars.start('start: "a" "b"?', [CALL])
  [a] = allowed(one)
  grammar.advance([one], [a])
  b, stop = allowed(one)  # not <|stop|>, though it is the tokenizer's
  assert stop == CALL
  grammar.advance([one], [b])
  assert allowed(one) == [CALL]
  both = grammars.start('start: "a"', [STOP, CALL])
  grammar.advance([both], [a])
  assert allowed(both) == [STOP, CALL]


def test_masks_ahead_are_those_on_the_way(grammars):
  text = 'start: "ab" ("c" | "d")'
  one, other = (grammars.start(text, [STOP]) for _ in range(2))
  a, b, d = (ord(x) - 33 for x in "abd")  # as the byte tokenizer numbers them
  ahead = one.ahead([a, b, d])
  for token, mask in zip([a, b, d], ahead, strict=False):
    np.testing.assert_array_equal(mask, other.allowed)
    grammar.advance([other], [token])
  np.testing.assert_array_equal(ahead[3], other.allowed)
  assert allowed(other) == [STOP]
  # Nothing comes after what cannot come, or after the end.
  assert [mask is None for mask in one.ahead([a, d, d])] == [False] * 2 + [
    True
  ] * 2
  assert [mask is None for mask in other.ahead([STOP, a])] == [
    False,
    True,
    True,
  ]
  assert allowed(one) == [a]  # and nothing has moved


def test_responses_advance_together_as_they_do_alone(grammars):
  texts = ['start: "aab"', "start: /[a-c]+/", 'start: "a"*']
  alone = [grammars.start(text, [STOP]) for text in texts]
  together = [grammars.start(text, [STOP]) for text in texts]
  a = allowed(alone[0])
  for one in alone:
    grammar.advance([one], a)
  grammar.advance(together, a * 3)
  for one, other in zip(alone, together, strict=True):
    np.testing.assert_array_equal(one.allowed, other.allowed)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("start: x", 'unknown name: "x"'),
    ("start: <[4000]>", "4000"),
    ("start: <|cal|>", "cal"),
    ('start: %json {"type": "strin"}', "Invalid type: strin"),
    ('start: %json {"not": {}}', r'Unimplemented keys: \["not"\]'),
    ('start: %json {"$ref": "#/a"}', "Pointer '/a' does not exist"),
    ('start: %json {"type": "string", "pattern": "("}', "unclosed group"),
    (
      'start: %json {"allOf": [{"type": "null"}, {"type": "string"}]}',
      "Unsatisfiable",
    ),
    ("start: " + "(" * 20000, "."),
    ("\x00", "."),
    ('start: "\ud800"', "not JSON serializable"),
    ('start: %json {"const": "\\ud800"}', "hex escape"),
    ("start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000, "recursion"),
    ("start: <[256]>", "no token of the vocabulary"),
  ],
)
def test_a_bad_grammar_says_what_is_wrong(grammars, text, message):
  with pytest.raises(errors.GrammarError, match=message):
    grammars.start(text, [STOP])


def test_a_grammar_without_a_stop_token_is_refused(grammars):
  with pytest.raises(errors.GrammarError, match="stop token"):
    grammars.start('start: "a"', [])


def test_whether_tokens_follow_a_grammar(grammars, byte_tokenizer):
  text = 'start: "ab" "c"?'
  for said, begins, whole in (
    ("", True, False),
    ("a", True, False),
    ("ab", True, True),
    ("abc", True, True),
    ("abcd", False, False),
    ("b", False, False),
  ):
    ids = byte_tokenizer.encode(said, add_special_tokens=False)
    assert grammars.follows(text, ids, False) == begins, said
    assert grammars.follows(text, ids, True) == whole, said


def test_a_token_that_is_not_allowed_is_that_responses_error(grammars):
  good, bad = (grammars.start("start: /[ab]+/", [STOP]) for _ in range(2))
  a = allowed(good)[0]
  grammar.advance([good, bad], [a, CALL])
  assert good.error is None and bad.error


# Schemas whose instances are short, whatever is drawn.
_NAMES = st.lists(st.sampled_from("abcdeé"), min_size=1, max_size=3).map(
  "".join
)
_LEAVES = st.one_of(
  st.just({"type": "null"}),
  st.just({"type": "boolean"}),
  st.builds(
    lambda low, more: {
      "type": "integer",
      "minimum": low,
      "maximum": low + more,
    },
    st.integers(-500, 500),
    st.integers(0, 500),
  ),
  st.builds(
    lambda low, more: {
      "type": "string",
      "minLength": low,
      "maxLength": low + more,
    },
    st.integers(0, 3),
    st.integers(0, 3),
  ),
  st.just({"type": "string", "pattern": "^[a-z]{2,4}-[0-9]$"}),
  st.just({"type": "string", "format": "date"}),
  st.builds(
    lambda values: {"enum": values},
    st.lists(
      st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=5),
      min_size=1,
      max_size=4,
      unique_by=json.dumps,
    ),
  ),
  st.builds(lambda value: {"const": value}, st.text(max_size=6)),
)


def _objects(schemas):
  return st.builds(
    lambda properties, required: {
      "type": "object",
      "properties": properties,
      "required": sorted(properties)[:required],
      "additionalProperties": False,
    },
    st.dictionaries(_NAMES, schemas, max_size=3),
    st.integers(0, 3),
  )


_SCHEMAS = st.recursive(
  _LEAVES,
  lambda schemas: (
    _objects(schemas)
    | st.builds(
      lambda items, low, more: {
        "type": "array",
        "items": items,
        "minItems": low,
        "maxItems": low + more,
      },
      schemas,
      st.integers(0, 2),
      st.integers(0, 2),
    )
    | st.builds(
      lambda options: {"anyOf": options},
      st.lists(schemas, min_size=1, max_size=3),
    )
  ),
  max_leaves=6,
)


@settings(max_examples=60)
@given(schema=_SCHEMAS, seed=st.integers(0, 2**32 - 1))
def test_every_walk_of_a_schema_is_valid_json(
  grammars, byte_tokenizer, schema, seed
):
  options = {"x-guidance": {"whitespace_pattern": " ?"}}
  text = "start: %json " + json.dumps({**schema, **options})
  progress = grammars.start(text, [STOP])
  tokens = walk(progress, np.random.default_rng(seed))
  value = json.loads(byte_tokenizer.decode(tokens))
  jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
