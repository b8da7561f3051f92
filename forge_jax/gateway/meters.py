"""The gateway's running figures, in Prometheus' text format."""

from collections.abc import Iterable

import prometheus_client
from prometheus_client import exposition

from forge_jax.gateway import admission, generation, session_table

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)  # buckets
CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST


class Meters:
  """Counts what one gateway serves."""

  def __init__(
    self,
    table: session_table.SessionTable,
    gate: admission.Admission,
  ):
    """Figures of the sessions in `table` and the requests behind `gate`."""
    self._registry = registry = prometheus_client.CollectorRegistry()

    def counter(name, text, labels=()):
      return prometheus_client.Counter(
        f"forge_gateway_{name}", text, labels, registry=registry
      )

    def gauge(name, text, read):
      made = prometheus_client.Gauge(
        f"forge_gateway_{name}", text, registry=registry
      )
      made.set_function(read)

    self._requests = counter(
      "requests", "Requests answered", ("route", "status")
    )
    self._prompt = counter("prompt_tokens", "Prompt tokens, before any cache")
    self._reused = counter(
      "reused_tokens", "Prompt tokens taken over from a recorded completion"
    )
    self._sampled = counter("sampled_tokens", "Tokens sampled")
    self._completions = counter(
      "completions", "Completions by how they ended", ("stop_reason",)
    )
    self._forks = counter(
      "forks", "Replayed turns that could not be extended", ("reason",)
    )
    self._seconds = prometheus_client.Histogram(
      "forge_gateway_request_seconds",
      "From a completion request's body to the end of its reply",
      ("route",),
      buckets=_SECONDS,
      registry=registry,
    )
    gauge("sessions", "Open sessions", lambda: len(table))
    gauge("running", "Completion requests running", lambda: gate.running)
    gauge("waiting", "Completion requests waiting", lambda: gate.waiting)

  def answered(self, route: str, status: int) -> None:
    """Counts an answer of any route."""
    self._requests.labels(route, str(status)).inc()

  def completed(
    self,
    route: str,
    seconds: float,
    choices: Iterable[generation.Generation],
  ) -> None:
    """Counts what a completion request sampled, whatever ended it."""
    self._seconds.labels(route).observe(seconds)
    for choice in choices:
      plan = choice.plan
      self._prompt.inc(len(plan.prompt_ids))
      self._reused.inc(len(plan.prompt_ids) - len(plan.added_ids))
      self._sampled.inc(len(choice.token_ids))
      self._completions.labels(choice.stop_reason.value).inc()
      if plan.fork_reason is not None:
        self._forks.labels(plan.fork_reason).inc()

  def text(self) -> bytes:
    """All figures, as a scrape expects them."""
    return prometheus_client.generate_latest(self._registry)
