"""Several engines as one: where a prompt's prefix is cached, or idle.

A request goes to the engine that has served the longest prefix of its prompt,
so that a session stays where its earlier turns are cached and a group's shared
prompt is prefilled in few places; unless that engine has `slack` requests more
in flight than the least busy one, which then takes it. An engine that cannot be
reached is left out for a while, and its request goes to another as long as no
token of it was seen.

Invariants:
  1. A request runs on one engine, and is sent to another only before its first
     token.
  2. What is remembered of prompts is bounded: `remembered` blocks.
  3. Every request goes to an engine with the latest weights that any has taken.
     An engine that did not take them gets no request until it takes later ones;
     where none took them, all go on with the old ones.
  4. Flushes and pauses reach every engine or raise.
"""

import collections
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import time

import numpy as np

from forge_jax import errors, types
from forge_jax.engine import api

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class RouterConfig:
  """Configures how requests spread over engines."""

  block: int = 64  # tokens; prefixes are compared in whole blocks
  slack: int = 8  # requests more than the least busy engine's, for a prefix
  remembered: int = 2**16  # blocks of prompts, over all engines
  rest: float = 5.0  # seconds for which an unreachable engine is left out


class Router:
  """An `engine.api.Engine` over several; lives on one asyncio loop."""

  def __init__(
    self, engines: Sequence[api.Engine], config: RouterConfig | None = None
  ):
    """Spreads requests over `engines`, at least one."""
    self._engines = tuple(engines)
    self._config = config or RouterConfig()
    self._in_flight = [0] * len(self._engines)
    self._rests_until = [0.0] * len(self._engines)
    self._current = set(range(len(self._engines)))  # have the latest weights
    # By a prefix's digest: the engine that served it last; newest at the end.
    self._served: collections.OrderedDict[bytes, int] = (
      collections.OrderedDict()
    )
    self._running: dict[str, int] = {}
    self._counts = {"routed_by_prefix": 0, "routed_by_load": 0, "rerouted": 0}

  @property
  def max_context(self) -> int:
    """The least of the engines'."""
    return min(engine.max_context for engine in self._engines)

  async def generate(
    self, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    """See `engine.api.Engine.generate`."""
    digests = list(self._digests(request.prompt_ids))
    tried: set[int] = set()
    while True:
      place = self._place(digests, tried)
      self._remember(digests, place)
      begun = False
      try:
        async with contextlib.aclosing(self._on(place, request)) as chunks:
          async for chunk in chunks:
            begun = True
            yield chunk
        return
      except errors.EngineUnavailableError as error:
        tried.add(place)
        self._rests_until[place] = time.monotonic() + self._config.rest
        if begun or tried >= self._current:
          raise
        self._counts["rerouted"] += 1
        _log.warning("request %s goes elsewhere: %s", request.id, error)

  def abort(self, request_id: str) -> None:
    """See `engine.api.Engine.abort`."""
    if (place := self._running.get(request_id)) is not None:
      self._engines[place].abort(request_id)

  def update_weights(self, weights: types.WeightsVersion) -> None:
    """See `engine.api.Engine.update_weights`.

    Engines that do not take the weights, though others do, are logged, counted
    in `stats` and left out.

    Raises:
      EngineError: no engine has taken them.
    """
    failures = self._try(lambda engine: engine.update_weights(weights))
    if len(failures) == len(self._engines):
      raise failures[0]
    for place, failure in failures.items():
      _log.error(
        "engine %d of %d has not taken weights version %d and is left out: %s",
        place,
        len(self._engines),
        weights.version,
        failure,
      )
    self._current = set(range(len(self._engines))) - failures.keys()

  def flush_cache(self) -> None:
    """See `engine.api.Engine.flush_cache`."""
    self._everywhere(lambda engine: engine.flush_cache())

  def pause(self) -> None:
    """See `engine.api.Engine.pause`."""
    self._everywhere(lambda engine: engine.pause())

  def resume(self) -> None:
    """See `engine.api.Engine.resume`."""
    self._everywhere(lambda engine: engine.resume())

  def stats(self) -> Mapping[str, float]:
    """The engines' figures added up, their version, and the router's own."""
    all_stats = [engine.stats() for engine in self._engines]
    names = set().union(*all_stats) - {"version"}
    added = {name: sum(s.get(name, 0) for s in all_stats) for name in names}
    versions = [
      all_stats[place]["version"]
      for place in self._current
      if "version" in all_stats[place]
    ]
    return (
      added
      | self._counts
      | {
        "version": min(versions, default=0),
        "stale_engines": len(self._engines) - len(self._current),
      }
    )

  async def _on(
    self, place: int, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    self._in_flight[place] += 1
    self._running[request.id] = place
    try:
      async with contextlib.aclosing(
        self._engines[place].generate(request)
      ) as chunks:
        async for chunk in chunks:
          yield chunk
    finally:
      self._in_flight[place] -= 1
      self._running.pop(request.id, None)

  def _place(self, digests: Sequence[bytes], tried: set[int]) -> int:
    """The engine that a prompt goes to."""
    now = time.monotonic()
    current = self._current  # which an update on another thread may replace
    left = sorted(current - tried) or sorted(current)
    # Where all rest, the one that has rested longest is tried.
    rested = [n for n in left if self._rests_until[n] <= now]
    left = rested or [min(left, key=self._rests_until.__getitem__)]
    idlest = min(left, key=self._in_flight.__getitem__)
    for digest in reversed(digests):
      place = self._served.get(digest)
      if place in left:
        if (
          self._in_flight[place] <= self._in_flight[idlest] + self._config.slack
        ):
          self._counts["routed_by_prefix"] += 1
          return place
        break
    self._counts["routed_by_load"] += 1
    return idlest

  def _remember(self, digests: Sequence[bytes], place: int) -> None:
    for digest in digests:
      self._served[digest] = place
      self._served.move_to_end(digest)
    while len(self._served) > self._config.remembered:
      self._served.popitem(last=False)

  def _digests(self, prompt_ids: Sequence[int]) -> Iterator[bytes]:
    """Of each whole block's prefix of a prompt, the shortest first."""
    data = np.asarray(prompt_ids, np.int32).tobytes()
    width = self._config.block * 4
    running = hashlib.blake2b(digest_size=16)
    for start in range(0, len(data) - width + 1, width):
      running.update(data[start : start + width])
      yield running.digest()

  def _everywhere(self, control: Callable[[api.Engine], None]) -> None:
    """Calls every engine at the same time; raises the first failure."""
    for failure in self._try(control).values():
      raise failure

  def _try(
    self, control: Callable[[api.Engine], None]
  ) -> dict[int, errors.EngineError]:
    """Calls every engine at the same time; returns the failures by place."""
    with concurrent.futures.ThreadPoolExecutor(len(self._engines)) as pool:
      done = [pool.submit(control, engine) for engine in self._engines]
    failures = {}
    for place, one in enumerate(done):
      try:
        one.result()
      except errors.EngineError as error:
        failures[place] = error
    return failures
