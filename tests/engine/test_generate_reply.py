"""Replies of /generate read back: ours, sglang-jax's as recorded, SGLang's."""

import json
import pathlib

import pytest

from forge_jax import errors, types
from forge_jax.engine import api, generate_reply

RECORDED = json.loads(
  (pathlib.Path(__file__).parent / "recorded/sglang_jax.json").read_text()
)["replies"]


def reader():
  return generate_reply.Reader("host", 5)


def recorded(name):
  body = RECORDED[name]["body"]
  if body.startswith("data:"):
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
  return json.loads(body)


def part(ids, count, *, pairs=None, reason=None, **meta):
  pairs = [(-0.5, id, None) for id in ids] if pairs is None else pairs
  meta = {"completion_tokens": count, "finish_reason": reason} | meta
  return {
    "output_ids": ids,
    "meta_info": meta | {"output_token_logprobs": pairs},
  }


def test_a_recorded_reply_of_sglang_jax():
  chunk = reader().read(recorded("whole"))
  assert chunk.token_ids == (37749, 14675, 39057, 11505, 25764)
  assert chunk.logprobs[0] == -10.840839385986328
  assert chunk.versions == (5,) * 5  # it tells none
  assert chunk.stop_reason == types.StopReason.LENGTH


def test_a_recorded_stream_of_sglang_jax_whose_lists_repeat_themselves():
  parts = recorded("stream")
  # All tokens so far, and log-probabilities of 1, 1+2, 1+2+3, ... tokens.
  pairs = [p["meta_info"]["output_token_logprobs"] for p in parts]
  assert [len(p["output_ids"]) for p in parts] == [1, 2, 3, 4]
  assert [len(p) for p in pairs] == [1, 3, 6, 10]
  read = reader()
  found = [read.read(one) for one in parts]
  assert [chunk.token_ids for chunk in found] == [
    (4607,),
    (27232,),
    (48750,),
    (11901,),
  ]
  assert found[2].logprobs == (-10.59792709350586,)
  assert found[3].stop_reason == types.StopReason.LENGTH


def test_recorded_alternatives_of_sglang_jax():
  chunk = reader().read(recorded("top"))
  assert chunk.top_logprobs[0] == (
    (44722, -9.864630699157715),
    (9257, -9.935922622680664),
  )
  assert len(chunk.top_logprobs) == len(chunk.token_ids) == 2


def test_recorded_errors_of_sglang_jax():
  for value in (recorded("long"), recorded("longstream")[0], recorded("bad")):
    with pytest.raises(errors.EngineError, match=r"host: .*(longer|negative)"):
      reader().read(value)


@pytest.mark.parametrize("cumulative", [True, False])
def test_streams_of_all_tokens_and_of_new_ones_read_alike(cumulative):
  read, found = reader(), []
  sampled, so_far = [[3], [4, 5], [], [6]], []
  for number, new in enumerate(sampled):
    so_far = so_far + new
    reason = {"type": "stop", "matched": 6} if number == 3 else None
    ids = so_far if cumulative else new
    found.append(read.read(part(ids, len(so_far), reason=reason)))
  assert [list(chunk.token_ids) for chunk in found] == sampled
  assert found[-1].stop_reason == types.StopReason.STOP
  assert all(chunk.stop_reason is None for chunk in found[:-1])


def test_versions_are_per_token_or_per_part_or_as_last_set():
  read = reader()
  first = read.read(part([1, 2], 2, weight_versions=[7, 8]))
  second = read.read(part([1, 2, 3], 3, weight_version="9"))
  third = read.read(part([4], 4, weight_version="default"))
  assert first.versions + second.versions + third.versions == (7, 8, 9, 5)


def test_an_abort_before_the_first_token_is_an_end():
  reason = {"type": "abort", "message": "Abort before prefill"}
  value = {
    "text": "",
    "meta_info": {"finish_reason": reason, "completion_tokens": 0},
  }
  chunk = reader().read(value)
  assert chunk == api.TokenChunk((), (), (), types.StopReason.ABORT)


def test_an_abort_with_a_status_is_a_failure():
  failed = {"type": "abort", "message": "no", "status_code": 400}
  with pytest.raises(errors.EngineError, match="host: no") as refused:
    reader().read(part([], 0, reason=failed))
  assert not isinstance(refused.value, errors.EngineUnavailableError)
  with pytest.raises(errors.EngineUnavailableError):
    reader().read(part([], 0, reason=failed | {"status_code": 503}))


@pytest.mark.parametrize(
  "value",
  [
    None,
    [],
    {},
    {"output_ids": [1]},
    {"output_ids": [1], "meta_info": None},
    part([1], 2),
    part([1], 1, pairs=[]),
    part([1], 1, pairs=[(-0.5, 2, None)]),  # another token's
    part([1], 1, pairs=[(None, 1, None)]),
    part([1], 1, pairs=[3]),
    part([1], 1, reason={"type": "weird"}),
    part([1], 1, reason="stop"),
    part([1, 2], 2, weight_versions=[3]),
    part([1, 2], 2, output_top_logprobs=[[]]),
    part([1], "1"),
  ],
)
def test_malformed_replies_are_refused(value):
  with pytest.raises(errors.EngineError, match="host: a reply is malformed"):
    reader().read(value)


def test_our_own_replies_read_back():
  request = api.GenerateRequest("r", (1, 2), api.SamplingParams(max_tokens=3))
  chunk = api.TokenChunk(
    (5, 6),
    (-0.25, -1.0000000149011612),
    (3, 4),
    types.StopReason.STOP,
    (((5, -0.25), (9, -2.0)), ((7, -0.5), (6, -1.0))),
  )
  value = generate_reply.reply(request, chunk, 2, logprobs=True, version=4)
  assert value["meta_info"]["weight_version"] == "4"
  assert value["meta_info"]["prompt_tokens"] == 2
  assert reader().read(json.loads(json.dumps(value))) == chunk
