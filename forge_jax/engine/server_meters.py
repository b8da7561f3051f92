"""The running figures of an engine's server, in Prometheus' text format."""

from collections.abc import Iterator
import contextlib
import time

import prometheus_client
from prometheus_client import core, exposition

from forge_jax.engine import api

CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)  # buckets


class ServerMeters:
  """Counts what one server of an engine does, and shows the engine's stats."""

  def __init__(self, engine: api.Engine):
    self._engine = engine
    self._registry = registry = prometheus_client.CollectorRegistry()
    registry.register(self)

    def histogram(name: str, text: str) -> prometheus_client.Histogram:
      return prometheus_client.Histogram(
        f"forge_engine_{name}", text, buckets=_SECONDS, registry=registry
      )

    def counter(name: str, text: str, label: tuple[str, ...]):
      return prometheus_client.Counter(
        f"forge_engine_{name}", text, label, registry=registry
      )

    self._requests = counter(
      "requests", "Requests answered", ("route", "status")
    )
    self._completions = counter(
      "completions", "Completions by how they ended", ("stop_reason",)
    )
    self._first = histogram(
      "first_token_seconds", "From a completion's request to its first token"
    )
    self._seconds = histogram(
      "completion_seconds", "From a completion's request to its end"
    )

  def collect(self) -> Iterator[core.GaugeMetricFamily]:
    """The engine's own figures, for the registry."""
    for name, value in self._engine.stats().items():
      yield core.GaugeMetricFamily(
        f"forge_engine_{name}", "As the engine reports it", value=float(value)
      )

  def answered(self, route: str, status: int) -> None:
    """Counts an answer of any route."""
    self._requests.labels(route, str(status)).inc()

  @contextlib.contextmanager
  def generating(self) -> Iterator["_Generating"]:
    """Counts and times a completion, whatever ends it."""
    one = _Generating(self._first)
    try:
      yield one
    finally:
      self._seconds.observe(time.monotonic() - one.started)
      self._completions.labels(one.stop_reason).inc()

  def text(self) -> bytes:
    """All figures, as a scrape expects them."""
    return prometheus_client.generate_latest(self._registry)


class _Generating:
  """One completion on its way."""

  def __init__(self, first: prometheus_client.Histogram):
    self._first = first
    self.started = time.monotonic()
    self.stop_reason = "failed"  # or the client went away
    self._begun = False

  def sampled(self, chunk: api.TokenChunk) -> None:
    """Notes what a chunk says."""
    if chunk.token_ids and not self._begun:
      self._begun = True
      self._first.observe(time.monotonic() - self.started)
    if chunk.stop_reason is not None:
      self.stop_reason = chunk.stop_reason.value
