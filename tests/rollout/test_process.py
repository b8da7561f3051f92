"""Process rewards: what each detector finds, and on which completion."""

import dataclasses
import re

import numpy as np
import pytest

from forge_jax import errors, types
from forge_jax.rollout import process

TEXTS = {}  # by token id: what it decodes to


def completion(text="fine", ids=None, **fields):
  if ids is None:
    ids = [len(TEXTS)]
    TEXTS[ids[0]] = text
  size = len(ids)
  return types.Completion(
    id="c",
    prompt_ids=np.zeros(1, np.int32),
    response_ids=np.array(ids, np.int32),
    logprobs=np.zeros(size, np.float32),
    versions=np.zeros(size, np.int32),
    stop_reason=types.StopReason.STOP,
    **fields,
  )


def decode(ids):
  return "".join(TEXTS.get(i, "") for i in ids)


def found(completions, transcript=(), **config):
  made = process.ProcessRewards(process.ProcessConfig(**config), decode)
  return [(r.name, r.step, r.value) for r in made(completions, transcript)]


def test_a_malformed_call_is_the_gateway_s_to_find():
  steps = [completion(), completion(malformed=True)]
  assert found(steps, malformed_call=0.2) == [("malformed_call", 1, -0.2)]


def test_what_costs_nothing_is_noted_all_the_same():
  assert found([completion(malformed=True)]) == [("malformed_call", 0, 0.0)]


def test_a_language_is_one_whatever_it_is():
  text = "We add the numbers, and the result is forty-two. "
  chinese = "\u6211\u4eec\u628a\u4e24\u4e2a\u6570\u5b57\u76f8\u52a0" * 4
  japanese = "\u3053\u308c\u306f\u6f22\u5b57\u3068\u30ab\u30ca\u3067\u3059" * 4
  greek = "x + \u03b1\u03b2\u03b3\u03b4 = \u03c0 in every triangle there is"
  for fine in (text, chinese, japanese, greek, "a\u6211", "12345 + 67 = ?"):
    assert process.mixed(fine) <= 0.1, fine
  assert process.mixed(text + chinese) > 0.4
  assert found([completion(text + chinese)], language_mixing=1.0) == [
    ("language_mixing", 0, -1.0)
  ]


def test_repetition_is_of_passages_not_of_words():
  rng = np.random.default_rng(0)
  assert process.repeated(rng.integers(0, 50, 400)) < 0.01
  assert process.repeated(np.tile(rng.integers(0, 50, 10), 20)) > 0.9
  assert process.repeated(np.zeros(20, np.int32)) == 0.0  # too short to tell
  loop = completion(ids=[7] * 100)
  assert [name for name, *_ in found([loop])] == ["repetition"]


def test_a_structure_is_what_is_asked_for():
  asked = "(?s)<think>.+</think>.+"
  steps = [
    completion("<think>a\nb</think> 4"),
    completion("4"),
    completion("<think></think>4"),
  ]
  assert [step for _, step, _ in found(steps, structure=asked)] == [1, 2]
  assert found(steps) == []


CALL = {"role": "assistant", "content": "", "tool_calls": [{}]}


def result(content):
  return {"role": "tool", "content": content}


def test_a_failing_call_is_found_on_the_completion_that_made_it():
  transcript = [
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "an example, which nobody sampled"},
    result("error: of the example"),
    CALL,
    result("error: there is no tool 'fly'"),
    CALL,
    result("fine"),
    result("some output\n[exit status 1]"),
    CALL,
    result("a log with error: in it, and [exit status 1] in the middle."),
    {"role": "assistant", "content": "Done."},
  ]
  sub_agent = types.Request("/", "m", "d", kind=types.RequestKind.SUB_AGENT)
  steps = [
    completion(),
    completion(request=sub_agent),
    completion(delivered=False),
    completion(),
    completion(),
    completion(),
  ]
  assert found(steps, transcript, failing_call=0.1) == [
    ("failing_call", 0, -0.1),
    ("failing_call", 3, -0.1),
  ]
  # The last request failed: there is a completion without a reply.
  assert [step for _, step, _ in found(steps[3:], transcript[3:6])] == [0]


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"repetition": -1.0}, "process.repetition is -1.0"),
    ({"structure": "("}, "no regular expression"),
    ({"most_mixed": 2.0}, "most_mixed is 2.0"),
  ],
)
def test_a_configuration_that_cannot_work(config, message):
  with pytest.raises(errors.ConfigError, match=re.escape(message)):
    process.ProcessConfig(**config)


def test_every_finding_has_its_cost():
  fields = {field.name for field in dataclasses.fields(process.ProcessConfig)}
  assert set(process.NAMES) <= fields
