"""What clients do to a turn that they send back, and what makes it another."""

import dataclasses
import json

import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax.gateway import turns

WRITTEN = '{"path": "caf\\u00e9.txt", "edits": [{"old": "a\\nb", "n": 1}]}'


def call(arguments=WRITTEN, id="call_0_0", name="edit"):
  return turns.Call(id, name, arguments)


def turn(text="I edit.", reasoning="Let me see.\n", calls=()):
  return turns.Turn(text, reasoning, tuple(calls))


SAMPLED = turn(calls=[call()])


@pytest.mark.parametrize(
  ("arguments", "by_id"),
  [
    (WRITTEN, False),
    ('{"edits":[{"n":1,"old":"a\\nb"}],"path":"café.txt"}', False),
    ('{"path": "café.txt", "edits": [{"old": "a\nb", "n": 1.0}]}', False),
    (json.dumps(WRITTEN), False),  # encoded twice
    # A default at the top, one inside, a text trimmed, one un-escaped.
    (WRITTEN.replace('{"path', '{"all": false, "path'), True),
    (WRITTEN.replace('"n": 1', '"n": 1, "all": null'), True),
    (WRITTEN.replace(".txt", ".txt\\n"), True),
    (WRITTEN.replace("\\n", "\\\\n"), True),
  ],
)
def test_arguments_that_are_the_same(arguments, by_id):
  issued = turn(calls=[call(arguments)])
  assert turns.likeness(issued, SAMPLED) == turns.ISSUED
  renamed = turn(calls=[call(arguments, id="toolu_7")])
  expected = turns.DIFFERENT if by_id else turns.EQUAL
  assert turns.likeness(renamed, SAMPLED) == expected


@pytest.mark.parametrize(
  "arguments",
  [
    WRITTEN.replace('"n": 1', '"n": 2'),
    WRITTEN.replace('"n": 1', '"n": true'),
    WRITTEN.replace('"n": 1', '"m": 1'),
    WRITTEN.replace("txt", "md"),
    '{"path": "caf\\u00e9.txt", "edits": []}',
    '{"path": "caf\\u00e9.txt"}',
    "{}",
    "null",
    "no JSON",
    '{"a":' * 10000,
  ],
)
@pytest.mark.parametrize("id", ["call_0_0", "toolu_7"])
def test_arguments_that_are_others(arguments, id):
  sent = turn(calls=[call(arguments, id=id)])
  assert turns.likeness(sent, SAMPLED) == turns.DIFFERENT


def test_text_and_reasoning_may_be_trimmed_or_lost():
  plain = turn()
  assert turns.likeness(plain, plain) == turns.EQUAL
  for sent in (
    turn(text="  I edit.\n"),
    turn(reasoning="Let me see."),
    turn(reasoning=""),
    turn("<think>\nLet me see.\n</think>\n\nI edit.", ""),
  ):
    assert turns.likeness(sent, plain) == turns.TRIMMED
    sent = dataclasses.replace(sent, calls=SAMPLED.calls)
    assert turns.likeness(sent, SAMPLED) == turns.ISSUED
  beside = turn("", "", [call(id="toolu_7")])
  assert turns.likeness(beside, SAMPLED) == turns.TRIMMED


@pytest.mark.parametrize(
  "sent",
  [
    turn(text="I edited."),
    turn(text=""),  # nothing is left of the turn
    turn(reasoning="Let me think."),
    turn("<think>No.</think>I edit.", ""),
    turn("<think>Let me see.</think>I edited.", ""),
    SAMPLED,
  ],
)
def test_another_text_or_reasoning_is_another_turn(sent):
  assert turns.likeness(sent, turn()) == turns.DIFFERENT


def test_calls_are_the_same_in_number_name_and_order():
  one, two = call(id="call_0_0"), call('{"path": "b"}', id="call_0_1")
  sampled = turn(calls=[one, two])
  assert turns.likeness(turn(calls=[two, one]), sampled) == turns.DIFFERENT
  assert turns.likeness(turn(calls=[one]), sampled) == turns.DIFFERENT
  other = dataclasses.replace(two, name="write")
  assert turns.likeness(turn(calls=[one, other]), sampled) == turns.DIFFERENT


JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-(2**53), 2**53)
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=8,
)


@hypothesis.given(
  value=st.dictionaries(st.text(max_size=4), JSON, max_size=4),
  shuffle=st.randoms(use_true_random=False),
)
def test_any_spelling_of_arguments_is_the_same(value, shuffle):
  items = list(value.items())
  shuffle.shuffle(items)
  spelt = json.dumps(
    dict(items), ensure_ascii=False, indent=shuffle.choice([None, 2])
  )
  assert turns.canonical(spelt) == turns.canonical(json.dumps(value))
  sampled = turn(calls=[call(json.dumps(value))])
  grown = json.dumps({**value, "a default": None})
  assert turns.likeness(turn(calls=[call(spelt)]), sampled) == turns.ISSUED
  assert turns.likeness(turn(calls=[call(grown)]), sampled) == turns.ISSUED


def test_a_digest_is_of_what_is_shown():
  respelt = turn(
    calls=[call('{"edits":[{"n":1,"old":"a\\nb"}],"path":"café.txt"}', "x")]
  )
  assert respelt.digest() == SAMPLED.digest()
  assert turn(text="I edit. ").digest() != turn().digest()
  assert turn(reasoning="").digest() != turn().digest()
  assert turn("I edit. ", "").loose_digest() == turn().loose_digest()
