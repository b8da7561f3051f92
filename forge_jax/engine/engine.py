"""The built-in JAX engine: a thread that schedules, runs and commits steps.

Invariants:
  - All device work happens on the engine's thread; callers only put messages
    into its inbox, which is emptied, in order, between two steps. So a request
    that is made after `update_weights` returned is sampled from those weights.
  - Every request ends with exactly one final chunk or one error.
  - A failed step fails every request, present and future, with its message;
    the thread never dies silently.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
import itertools
import threading
import time

from absl import logging

from forge_jax import errors, types
from forge_jax.engine import (
  api,
  endings,
  grammar,
  memory,
  prefix_cache,
  rows,
  sampling,
  speculation,
  streams,
)
from forge_jax.engine import config as config_lib
from forge_jax.engine import runner as runner_lib
from forge_jax.engine import scheduler as scheduler_lib
from forge_jax.engine import weights as weights_lib
from forge_jax.model import decoder as decoder_lib


class JaxEngine:
  """An `engine.api.Engine` on this process's devices."""

  def __init__(
    self,
    decoder: decoder_lib.Decoder,
    config: config_lib.EngineConfig,
    *,
    decode_text: Callable[[Sequence[int]], str] | None = None,
    grammars: grammar.Grammars | None = None,
    version: int = 0,
  ):
    """Allocates the caches; `start` compiles and begins to serve.

    Args:
      decoder: graph and first weights.
      config: sizes.
      decode_text: token ids to text, needed for stop strings only.
      grammars: of the model's vocabulary, needed for grammars only.
      version: version of the first weights.

    Raises:
      ConfigError: sizes that do not fit together or the model.
    """
    self.config = config
    self.version = version
    self._decode_text = decode_text
    self._grammars = grammars
    self._runner = runner_lib.Runner(decoder, config)
    self._speculation = speculation.Speculation(
      config.decode_rows,
      config.draft_tokens if self._runner.modules else 0,
      adaptive=config.draft_adaptive,
    )
    self._scheduler = scheduler_lib.Scheduler(
      scheduler_lib.SchedulerConfig(
        slots=config.slots,
        context=config.context,
        blocks=config.prefill_rows[-1],
        block=config.prefill_chunk,
        step_tokens=config.step_tokens,
        prefill_patience=config.prefill_patience,
        decode_steps=config.decode_steps,
      ),
      prefix_cache.PrefixCache(
        config.pages, config.page, config.host_pages, reuse=config.reuse
      ),
      self._speculation.length,
    )
    self._streams: dict[str, streams.Stream] = {}
    self._progress: dict[str, grammar.Progress] = {}  # of those with a grammar
    self._inbox: list[tuple[str, object]] = []
    self._wake = threading.Condition()
    self._stopping = self._paused = False
    self._failure: str | None = None
    self._thread = threading.Thread(
      target=self._serve, name="engine", daemon=True
    )
    self._sampled = self._prefilled = self._steps = 0
    self._busy_seconds = 0.0
    self._since = 0.0  # when the last step or message was done with

  @property
  def max_context(self) -> int:
    return self.config.context

  @property
  def compilations(self) -> int:
    """Traces of device functions so far; constant after `start`."""
    return self._runner.compilations

  def start(self) -> None:
    """Compiles every step shape, then serves until `stop`."""
    self._runner.warm_up()
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread; requests in flight get a final ABORT chunk."""
    with self._wake:
      self._stopping = True
      self._wake.notify()
    if self._thread.is_alive():
      self._thread.join()

  async def generate(
    self, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    """See `engine.api.Engine.generate`."""
    self._check(request)
    progress = None
    if request.sampling.grammar is not None:
      # Away from the caller's loop, and from the engine's thread.
      progress = await asyncio.to_thread(
        self._grammars.start,
        request.sampling.grammar,
        request.sampling.stop_token_ids,
      )
    stream = streams.Stream()
    self._post("add", (request, stream, progress))
    finished = False
    try:
      while not finished:
        try:
          chunk = await stream.take()
        except errors.EngineError:
          finished = True
          raise
        finished = chunk.stop_reason is not None
        yield chunk
    finally:
      if not finished:
        self.abort(request.id)

  def abort(self, request_id: str) -> None:
    """See `engine.api.Engine.abort`; an unknown id is ignored."""
    self._post("abort", request_id)

  def update_weights(self, weights: types.WeightsVersion) -> None:
    """See `engine.api.Engine.update_weights`; takes arrays or a folder.

    Cached prefixes of older weights serve no prompt any more, and prompts that
    are being prefilled begin anew. A request that has sampled tokens goes on,
    with its cache or without, as `on_update` says.
    """
    memory.give_back()  # what the weights before these were in
    state = weights_lib.receive(weights, self._runner.model, self._runner.dtype)
    prepared = self._runner.prepare(state)
    self._post("weights", (weights.version, prepared))

  def flush_cache(self) -> None:
    """See `engine.api.Engine.flush_cache`."""
    self._post("flush", None)

  def pause(self) -> None:
    """See `engine.api.Engine.pause`."""
    self._post("pause", True)

  def resume(self) -> None:
    """See `engine.api.Engine.resume`."""
    self._post("pause", False)

  def settle(self, timeout: float) -> None:
    """See `engine.api.LocalEngine.settle`."""
    settled = threading.Event()
    self._post("settle", settled)
    if not settled.wait(timeout):
      raise errors.EngineUnavailableError(
        f"the engine finished no step in {timeout:g} s"
      )

  def stats(self) -> Mapping[str, float]:
    """Totals since the start: tokens, seconds busy, cache use, drafts."""
    cache = self._scheduler.cache
    return {
      "sampled_tokens": self._sampled,
      "prefilled_tokens": self._prefilled,
      "prompt_tokens": self._scheduler.prompt_tokens,
      "reused_tokens": self._scheduler.reused_tokens,
      "preempted": self._scheduler.preempted,
      "evicted_pages": cache.evicted,
      "loaded_pages": cache.loaded,
      "steps": self._steps,
      "busy_seconds": self._busy_seconds,
      "live": len(self._scheduler) - self._scheduler.waiting,
      "waiting": self._scheduler.waiting,
      "version": self.version,
      **self._speculation.stats(),
    }

  def _check(self, request: api.GenerateRequest) -> None:
    if self._failure or self._stopping:
      raise errors.EngineUnavailableError(
        self._failure or "the engine is stopped"
      )
    api.check(request, self.max_context, self._runner.model.vocab_size)
    for field, need in (
      ("stop_strings", self._decode_text),
      ("grammar", self._grammars),
    ):
      if need is None and getattr(request.sampling, field):
        raise errors.EngineError(
          f"request {request.id}: {field} needs an engine with a tokenizer"
        )

  @property
  def _busy(self) -> bool:
    return len(self._scheduler) > 0 and not self._paused

  def _post(self, kind: str, message: object) -> None:
    with self._wake:
      self._inbox.append((kind, message))
      self._wake.notify()

  def _serve(self) -> None:
    """The thread: empties the inbox, runs a step, hands out its results."""
    while True:
      with self._wake:
        while not (self._inbox or self._stopping or self._busy):
          self._wake.wait()
        inbox, self._inbox = self._inbox, []
        stopping = self._stopping
      posts: list[tuple[streams.Stream, object]] = []
      try:
        for kind, message in inbox:
          self._receive(kind, message, posts)
        if inbox:
          self._since = time.perf_counter()
        if stopping:
          for request_id in list(self._streams):
            self._end(request_id, types.StopReason.ABORT, posts)
        elif self._failure is None and not self._paused:
          self._step(posts)
      except Exception as e:  # boundary: a failed step is its callers' error
        logging.exception("engine step failed")
        self._fail(f"the engine failed: {type(e).__name__}: {e}", posts)
      streams.hand_over(posts)
      if stopping:
        return

  def _receive(self, kind: str, message, posts: list) -> None:
    if kind == "add":
      request, stream, progress = message
      if self._failure is not None:
        posts.append((stream, errors.EngineUnavailableError(self._failure)))
        return
      if request.id in self._streams:
        message = f"request id {request.id} is already in flight"
        posts.append((stream, errors.EngineError(message)))
        return
      if self._scheduler.waiting >= self.config.most_waiting:
        message = f"{self._scheduler.waiting} requests are waiting already"
        posts.append((stream, errors.EngineBusyError(message)))
        return
      self._streams[request.id] = stream
      if progress is not None:
        self._progress[request.id] = progress
      self._scheduler.add(request)
    elif kind == "abort":
      self._end(message, types.StopReason.ABORT, posts)
    elif kind == "pause":
      self._paused = message
    elif kind == "settle":
      message.set()
    else:
      if kind == "weights":
        self.version, weights = message
        self._runner.set_weights(weights)
      self._scheduler.forget(
        recompute=kind == "weights" and self.config.on_update == "recompute"
      )

  def _step(self, posts: list) -> None:
    step = self._scheduler.schedule()
    if step is None:
      return
    self._runner.move(step.moves)
    results = self._runner.run(
      *rows.make(step, self._progress), step.decode_steps
    )
    self._prefilled += sum(len(block.tokens) for block in step.blocks)
    for index, result in enumerate(itertools.chain.from_iterable(results)):
      self._commit(step, index, result, posts)
    # With what the host did since the step before: that is what callers see.
    now = time.perf_counter()
    seconds, self._since = now - self._since, now
    if not step.blocks:
      taken = [sum(one.token_R >= 0 for one in some) for some in results]
      self._speculation.record(step.drafts, taken, seconds)
    self._busy_seconds += seconds
    self._steps += 1

  def _commit(
    self,
    step: scheduler_lib.Step,
    index: int,
    result: sampling.Sampled,
    posts: list,
  ) -> None:
    """Takes in one token of each row, and hands it to its caller."""
    sampled = self._scheduler.commit(step, result.token_R, index)
    self._sampled += len(sampled)
    for live, row in sampled:
      logprob = float(result.logprob_R[row])
      reason = (
        self._scheduler.stop_reason(live)
        or endings.stop_string(live, self._decode_text)
        or endings.early_stop(live, logprob, self.config)
      )
      wanted = live.request.sampling.top_logprobs
      chunk = api.TokenChunk(
        (live.response[-1],),
        (logprob,),
        (self.version,),
        reason,
        (result.tops(row, wanted),) if wanted else (),
      )
      posts.append((self._streams[live.request.id], chunk))
      if reason is not None:
        self._forget(live.request.id)
    self._follow([live for live, _ in sampled], posts)

  def _follow(
    self, sampled: Sequence[scheduler_lib.LiveRequest], posts: list
  ) -> None:
    """Takes the sampled tokens of requests that go on into their grammars."""
    going = [live for live in sampled if live.request.id in self._progress]
    progresses = [self._progress[live.request.id] for live in going]
    grammar.advance(progresses, [live.response[-1] for live in going])
    for live, progress in zip(going, progresses, strict=True):
      if progress.error is not None:
        message = f"request {live.request.id}: {progress.error}"
        stream = self._streams[live.request.id]
        posts.append((stream, errors.GrammarError(message)))
        self._forget(live.request.id)

  def _end(
    self, request_id: str, reason: types.StopReason, posts: list
  ) -> None:
    stream = self._streams.get(request_id)
    if stream is not None:
      posts.append((stream, api.TokenChunk((), (), (), reason)))
      self._forget(request_id)

  def _forget(self, request_id: str) -> None:
    self._scheduler.finish(request_id)
    self._progress.pop(request_id, None)
    del self._streams[request_id]

  def _fail(self, message: str, posts: list) -> None:
    self._failure = message
    # What was posted in the failed step may be incomplete for its requests.
    for request_id, stream in list(self._streams.items()):
      posts.append((stream, errors.EngineUnavailableError(message)))
      self._forget(request_id)
