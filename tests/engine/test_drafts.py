"""Drafts and their verification, on tiny models with modules that draft."""

import argparse
import asyncio
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import (
  collect,
  decoder,
  dense_logprobs,
  prompts,
  request,
)

from forge_jax import types
from forge_jax.engine import (
  attention,
  batch,
  config,
  drafts,
  engine,
  runner,
  sampling,
  weights,
)
from forge_jax.engine import pages as pages_lib
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp, published, rope, sharding

CONFIG = config.EngineConfig(
  slots=8,
  context=64,
  page=8,
  decode_rows=(8,),
  prefill_rows=(4,),
  prefill_chunk=16,
  prefill_patience=2,
)


def drafting(modules, seed=0):
  """The tiny decoder, with modules of which some drafts are right."""
  return mtp.grow(decoder(seed), modules, rngs=nnx.Rngs(params=seed + 1))


def greedy_drafts(model, tokens, count):
  """The drafts after a sequence's last token, by dense attention."""
  tokens, modules, own = list(tokens), len(model.mtp), None
  given = len(tokens) + modules - 2  # the last whose own state nobody reads
  for n in range(count):
    ids, position = jnp.asarray([tokens]), jnp.arange(len(tokens))[None]
    attend = decoder_lib.causal_attend
    trunk = model.hidden(ids, position, attend)
    states = [
      trunk,
      *mtp.hidden(model, trunk, ids, position - 1, position, attend),
    ]
    if n < modules:
      own = states[n + 1]
    else:
      before = jnp.pad(states[modules - 1], ((0, 0), (1, 0), (0, 0)))[:, :-1]
      before = before.at[:, given + 1 :].set(own[:, given:])
      own = model.mtp[-1](
        model.embed(ids, model.dtype),
        before,
        rope.angles(model.config, position),
        attend,
      )
    tokens.append(int(model.logits(own[0, -1]).argmax()))
  return tokens[-count:]


def row(tokens, start=0, **changes):
  pages = [3, 1, 7, 5, 2, 4]  # of eight tokens
  return batch.Row(pages, tokens, start, 0, 0.0, 0, 1.0, **changes)


def drafts_of(made, prompt, count):
  """The token after a prompt, and the drafts after that, by a runner."""
  blocks = [row(prompt[n : n + 16], n) for n in range(0, len(prompt), 16)]
  [[first]] = made.run([], blocks)
  token = int(first.token_R[len(blocks) - 1])
  seen = []

  def shapes(drafted):
    seen.extend(drafted)
    return [None] * (1 + len(drafted))

  made.run([row([token], len(prompt), drafts=count, shapes=shapes)], [])
  return [token, *seen]


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafts_are_what_the_modules_say_on_the_whole_sequence(modules):
  model = drafting(modules)
  made = runner.Runner(model, CONFIG)
  for prompt in prompts(2, length=21):
    token, *drafted = drafts_of(made, prompt, 3)
    assert drafted == greedy_drafts(model, [*prompt, token], 3)


@pytest.mark.parametrize("modules", [1, 2])
def test_upkeep_of_the_last_module_has_no_attention(modules):
  model = drafting(modules)
  unrolled = decoder_lib.UnrolledDecoder(model, modules)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  pages = pages_lib.Pages(
    model.config, CONFIG, "xla", model.dtype, modules, mesh
  )
  rows = batch.make([row([1], 5)], [], 8, 0, CONFIG).decode

  def keep(caches, hidden_TD, rows):
    at, before = (rows.places(8, 10, back) for back in range(2))
    none = jax.tree.map(lambda x: x[:0], rows)
    attends = [
      attention.Paged("xla", cache.layer, at, rows, none, mesh)
      for cache in caches
    ]
    tokens, position = rows.token_RW[:, 0], rows.position_RW[:, 0]
    return drafts.keep(
      unrolled, caches, attends, tokens, position, hidden_TD, at, before
    )

  lowered = jax.jit(keep).lower(pages.modules, jnp.zeros((8, 32)), rows)
  # Attention is a loop over pages.
  assert lowered.compile().as_text().count(" while(") == modules - 1


def test_pages_are_updated_in_place():
  made = runner.Runner(drafting(2), CONFIG)
  before = jax.tree.leaves((made._pages.layers, made._pages.modules))
  made.run([], [row(prompts(1)[0][:16])])
  assert all(x.is_deleted() for x in before)


@pytest.mark.parametrize("by", ["arrays", "folder"])
def test_new_weights_bring_their_modules(tmp_path, by):
  made, new = runner.Runner(drafting(2), CONFIG), drafting(2, seed=5)
  state = nnx.state(new)
  version = types.WeightsVersion(3, params=state)
  if by == "folder":
    params = {k: np.asarray(x) for k, x in decoder_lib.flatten(state).items()}
    published.write(tmp_path / "v3", new.config, params, 3)
    version = types.WeightsVersion(3, path=str(tmp_path / "v3"))
  received = weights.receive(version, made.model, made.dtype)
  made.set_weights(made.prepare(received))
  [prompt] = prompts(1, length=21)
  token, *drafted = drafts_of(made, prompt, 3)
  assert drafted == greedy_drafts(new, [*prompt, token], 3)


def test_modules_that_no_drafts_are_wanted_of_are_left_out():
  made = runner.Runner(drafting(3), dataclasses.replace(CONFIG, draft_tokens=1))
  plain = runner.Runner(
    drafting(3), dataclasses.replace(CONFIG, draft_tokens=0)
  )
  assert (made.modules, plain.modules) == (1, 0)
  trunk = runner.Runner(decoder(), CONFIG)
  assert len(plain._weights) == len(trunk._weights) < len(made._weights)


@pytest.fixture(scope="module")
def plain():
  """Replies of an engine that does not draft, by what is asked."""
  made = engine.JaxEngine(decoder(), CONFIG, decode_text=text)
  made.start()
  yield made
  made.stop()


def text(ids):
  return "".join(f"<{i}>" for i in ids)


ASKED = (
  {"temperature": 0.0},
  {},
  {"temperature": 0.4, "top_k": 9},
  {"temperature": 2.0, "top_p": 0.8},
  {"min_p": 0.1, "top_logprobs": 3},
  {"repetition_penalty": 1.3, "temperature": 0.0},
  {"frequency_penalty": 0.9, "presence_penalty": 0.5},
  {"logit_bias": ((5, 4.0), (7, 3.0)), "seed": 8},
  {"stop_token_ids": tuple(range(0, 97, 9))},
  {"stop_strings": ("<5", "4>")},
  {"max_tokens": 1},
  {"max_tokens": 41},  # up to the end of the context
)


@pytest.mark.parametrize(
  ("modules", "length", "changes"),
  [
    (1, 3, {"decode_steps": 12}),
    (2, 2, {"cache_tokens": 128, "host_cache_tokens": 256}),
  ],
)
async def test_drafts_change_no_token_and_no_log_probability(
  plain, modules, length, changes
):
  made = engine.JaxEngine(
    drafting(modules),
    dataclasses.replace(
      CONFIG, draft_tokens=length, draft_adaptive=False, **changes
    ),
    decode_text=text,
  )
  made.start()
  try:
    asked = [
      request(f"{n}", prompt, **{"max_tokens": 30, "seed": n, **more})
      for n, (prompt, more) in enumerate(
        zip(prompts(len(ASKED)), ASKED, strict=True)
      )
    ]
    expected, found = [
      await asyncio.gather(*(collect(some, one) for one in asked))
      for some in (plain, made)
    ]
    for one, other in zip(expected, found, strict=True):
      assert one[0] == other[0] and one[2:] == other[2:]
      np.testing.assert_allclose(one[1], other[1], atol=3e-5)
    stats = made.stats()
    assert 0 < stats["accepted_tokens"] < stats["drafted_tokens"]
    assert (stats["preempted"] > 0) == ("cache_tokens" in changes)
    [ids, logprobs, *_] = found[1]
    np.testing.assert_allclose(
      logprobs, dense_logprobs(decoder(), prompts(2)[1], ids), atol=3e-5
    )
  finally:
    made.stop()


async def test_what_is_cached_drafts_as_well_as_what_is_computed():
  accepted = []
  for reuse in (True, False):
    made = engine.JaxEngine(
      drafting(2),
      dataclasses.replace(
        CONFIG, draft_tokens=2, draft_adaptive=False, reuse=reuse
      ),
    )
    made.start()
    try:
      [prompt] = prompts(1, length=30)
      for n in range(6):
        ids, *_ = await collect(
          made, request(f"{n}", prompt, seed=n, max_tokens=8)
        )
      await collect(made, request("turn", prompt + ids + [1], max_tokens=20))
      stats = made.stats()
      accepted.append((stats["accepted_tokens"], stats["drafted_tokens"]))
      assert (stats["reused_tokens"] > 0) == reuse
    finally:
      made.stop()
  assert accepted[0] == accepted[1] and accepted[0][0] > 0


async def test_new_weights_in_flight_are_the_later_tokens_policy():
  made = engine.JaxEngine(
    drafting(1),
    dataclasses.replace(CONFIG, draft_adaptive=False, on_update="recompute"),
  )
  made.start()
  new = drafting(1, seed=1)
  try:
    made.pause()
    [prompt] = prompts(1)
    stream = made.generate(request("long", prompt, max_tokens=40))
    ids, logprobs, versions = [], [], []
    made.resume()
    async for chunk in stream:
      ids += chunk.token_ids
      logprobs += chunk.logprobs
      versions += chunk.versions
      if len(ids) == 1:
        made.update_weights(types.WeightsVersion(1, params=nnx.state(new)))
    assert versions == sorted(versions)
    for version, model in enumerate((decoder(), decoder(1))):
      of_it = np.asarray(versions) == version
      np.testing.assert_allclose(
        np.asarray(logprobs)[of_it],
        dense_logprobs(model, prompt, ids)[of_it],
        atol=3e-5,
      )
  finally:
    made.stop()


async def test_a_steps_time_is_measured_with_the_hosts_work(monkeypatch):
  now = 0.0

  def slow_text(ids):  # as long as a stop string is looked for
    nonlocal now
    now += 1.0
    return text(ids)

  clock = lambda: now
  monkeypatch.setattr(engine, "time", argparse.Namespace(perf_counter=clock))
  made = engine.JaxEngine(drafting(1), CONFIG, decode_text=slow_text)
  made.start()
  try:
    asked = request("a", prompts(1)[0], stop_strings=("never",))
    ids, *_ = await collect(made, asked)
    # The first token is of the prompt's step, and after the last nothing is
    # looked for.
    assert made.stats()["decode_seconds"] == len(ids) - 2 == now - 1
  finally:
    made.stop()


async def test_nothing_compiles_after_the_start():
  made = engine.JaxEngine(drafting(1), CONFIG)
  made.start()
  try:
    before = made.compilations
    await asyncio.gather(
      *(
        collect(made, request(str(n), p, seed=n, max_tokens=30))
        for n, p in enumerate(prompts(20))
      )
    )
    assert made.stats()["drafted_tokens"] > 0  # every length is tried
    assert made.compilations == before
  finally:
    made.stop()


def test_the_distribution_is_the_policys_whatever_drafts():
  count, vocab = 40_000, 6
  keys = jax.random.split(jax.random.key(0), 3)
  # p(x), p(y | x) and, unlike them, q(x); temperature and filters besides.
  p_V, q_V = (jax.random.normal(k, (vocab,)) for k in keys[:2])
  p_VV = jax.random.normal(keys[2], (vocab, vocab))
  seeds = jnp.arange(count, dtype=jnp.uint32)
  fill = lambda x, dtype=jnp.float32: jnp.full(count, x, dtype)

  def sample(logits_NV, position):
    return sampling.sample(
      jnp.broadcast_to(logits_NV, (count, vocab)),
      seeds,
      fill(position, jnp.int32),
      fill(0.9),
      fill(5, jnp.int32),
      fill(0.95),
      fill(0.01),
    )[0]

  draft = sample(q_V[None], 4)
  sampled = jnp.stack([sample(p_V[None], 4), sample(p_VV[draft], 5)], 1)
  token_NW = jnp.stack([fill(0, jnp.int32), draft], 1)
  taken, last = sampling.accepted(token_NW, fill(2, jnp.int32), sampled)
  assert set(np.unique(taken)) == {1, 2}
  np.testing.assert_array_equal(
    last, jnp.where(taken == 2, sampled[:, 1], sampled[:, 0])
  )
  # Where the draft was rejected, the next step samples the second token.
  second = jnp.where(taken == 2, sampled[:, 1], sample(p_VV[sampled[:, 0]], 5))
  found = np.zeros((vocab, vocab))
  np.add.at(found, (np.asarray(sampled[:, 0]), np.asarray(second)), 1)

  def allowed(logits):
    kept = sampling._scaled(
      logits[None],
      *(jnp.full(1, x) for x in (0.9, 5, 0.95, 0.01)),
    )
    return np.asarray(jax.nn.softmax(kept[0]))

  expected = count * np.stack(
    [a * allowed(p_VV[x]) for x, a in enumerate(allowed(p_V))]
  )
  assert not found[expected == 0].any()
  likely = expected > 5
  error = (found - expected)[likely] ** 2 / expected[likely]
  degrees = likely.sum() - 1
  # Four standard deviations of chi-square above its mean.
  assert error.sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_drafts_as_good_as_the_policy_are_all_accepted():
  logits = jax.random.normal(jax.random.key(1), (500, 97))
  args = (
    jnp.arange(500, dtype=jnp.uint32),
    jnp.full(500, 9),
    jnp.ones(500),
    jnp.zeros(500, jnp.int32),
    jnp.ones(500),
    jnp.zeros(500),
  )
  draft, _ = sampling.sample(logits, *args)
  token = jnp.stack([jnp.zeros_like(draft), draft], 1)
  sampled = jnp.stack([draft, jnp.zeros_like(draft)], 1)
  taken, _ = sampling.accepted(token, jnp.full(500, 2), sampled)
  assert (taken == 2).all()
  # A row without room for a draft accepts none.
  taken, last = sampling.accepted(token, jnp.full(500, 1), sampled)
  assert (taken == 1).all() and (last == draft).all()
