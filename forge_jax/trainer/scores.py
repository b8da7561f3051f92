"""What the episodes of a step got, as metrics: by component and by domain."""

from collections.abc import Mapping, Sequence
import statistics

from forge_jax.observe import names
from forge_jax.trainer import credit


def figures(scores: Sequence[credit.Score]) -> dict[str, float]:
  """Metrics of the episodes of a step; empty if there are none."""
  if not scores:
    return {}
  values = {
    f"{names.REWARD}/{component}": statistics.fmean(
      getattr(score, component) for score in scores
    )
    for component in ("process", "speed", "perf")
  }
  values |= _named(scores)
  values[names.EPISODE_TOKENS] = statistics.fmean(
    score.response_tokens for score in scores
  )
  values[names.EPISODE_FAILED] = statistics.fmean(
    score.failed for score in scores
  )
  for domain in sorted({score.domain for score in scores}):
    values |= _of_domain(domain, scores)
  return values


def _named(scores: Sequence[credit.Score]) -> Mapping[str, float]:
  """Of each reward: its mean over episodes, and how often it is given."""
  completions = max(sum(score.completions for score in scores), 1)
  values = {}
  for name in sorted({name for score in scores for name in score.named}):
    values[f"{names.REWARD}/{name}"] = statistics.fmean(
      score.named.get(name, 0.0) for score in scores
    )
    noted = sum(score.noted.get(name, 0) for score in scores)
    values[f"{names.NOTED}/{name}"] = noted / completions
  return values


def _of_domain(
  domain: str, scores: Sequence[credit.Score]
) -> Mapping[str, float]:
  own = [score for score in scores if score.domain == domain]
  return {
    f"{names.DOMAIN_SHARE}/{domain}": len(own) / len(scores),
    f"{names.DOMAIN_SUCCESS}/{domain}": statistics.fmean(
      score.success for score in own
    ),
    f"{names.DOMAIN_REWARD}/{domain}": statistics.fmean(
      float(score.total_S.sum()) for score in own
    ),
    f"{names.DOMAIN_TOKENS}/{domain}": statistics.fmean(
      score.response_tokens for score in own
    ),
    f"{names.DOMAIN_SECONDS}/{domain}": statistics.median(
      score.seconds for score in own
    ),
  }
