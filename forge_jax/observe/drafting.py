"""What drafting did to an engine's decoding steps, as metrics."""

from collections.abc import Mapping

from forge_jax.observe import names

# Totals of an engine that drafts; see engine/speculation.py.
TOTALS = (
  "decoded_rows",
  "verified_rows",
  "drafted_tokens",
  "accepted_tokens",
  "decode_seconds",
  "plain_decode_seconds",
)


def values(grown: Mapping[str, float]) -> dict[str, float]:
  """Metrics by name, from how much each of `TOTALS` grew in a trainer step.

  Empty where no engine that drafts has decoded anything.
  """
  if not grown["decoded_rows"]:
    return {}
  drafted, accepted = grown["drafted_tokens"], grown["accepted_tokens"]
  speedup = grown["plain_decode_seconds"] / grown["decode_seconds"]
  figures = {
    names.SPECULATION_DRAFTS: drafted / grown["decoded_rows"],
    names.SPECULATION_SPEEDUP: speedup,
  }
  if drafted:
    figures[names.SPECULATION_LENGTH] = 1 + accepted / grown["verified_rows"]
    figures[names.SPECULATION_ACCEPTED] = accepted / drafted
  return figures
