"""Groups to store, and how to compare them."""

import dataclasses
import math

import numpy as np

from forge_jax import types


def make_completion(rng, name, prompt, response):
  return types.Completion(
    id=name,
    prompt_ids=rng.integers(0, 2**31 - 1, prompt, dtype=np.int32),
    response_ids=rng.integers(0, 2**31 - 1, response, dtype=np.int32),
    logprobs=-rng.exponential(size=response).astype(np.float32),
    versions=rng.integers(0, 9, response, dtype=np.int32),
    stop_reason=types.StopReason.LENGTH,
    parent=None if name.endswith("0") else f"{name[:-1]}0",
    fork_reason="history rewritten" if name.endswith("1") else None,
    started=float(rng.random()),
    finished=float(rng.random()) + 1,
    first_token=float(rng.random()),
    malformed=name.endswith("1"),
    delivered=name.endswith("0"),
    request=types.Request(
      protocol="/messages",
      model="é",
      digest="ab",
      kind=types.RequestKind.COMPACTION,
      client_ids={"thread-id": "t"},
      retry_of=f"{name}-before",
      arrived=float(rng.random()),
    ),
  )


def make_group(index=3, episodes=3, turns=2, seed=0):
  rng = np.random.default_rng(seed)
  task = types.Task(
    id="sums/train/7", domain="sums", index=7, payload={"a": 1, "b": [2.5, "é"]}
  )
  made = []
  for member in range(episodes):
    completions = tuple(
      make_completion(rng, f"{member}-{t}", t * 5, 1 + t * 3)
      for t in range(turns)
    )
    made.append(
      types.Episode(
        id=f"group{index}-{member}",
        task=task,
        member=member,
        seed=2**31 - 1 - member,
        status=list(types.EpisodeStatus)[member % 3],
        completions=completions,
        rewards=(
          types.Reward("answer", types.Component.PERF, 0.1 + 0.2),
          types.Reward("style", types.Component.PROCESS, -1 / 3, step=1),
        ),
        messages=({"role": "user", "content": "naïve \ud800 ☃"},),
        seconds=math.pi,
        error=None if member % 3 == 0 else "ValueError: no",
      )
    )
  return types.Group(index=index, task=task, episodes=tuple(made))


def assert_same(one, other):
  if isinstance(one, np.ndarray):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
  elif dataclasses.is_dataclass(one):
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
      assert_same(getattr(one, field.name), getattr(other, field.name))
  elif isinstance(one, tuple):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
      assert_same(a, b)
  else:
    assert type(one) is type(other)
    assert one == other
