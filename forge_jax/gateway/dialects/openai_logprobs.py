"""Log-probabilities as Chat Completions and Responses say them, in nats.

They are those of the distribution that was sampled from; what was impossible
under it is in no list of alternatives.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from forge_jax.engine import api
from forge_jax.gateway import generation, render
from forge_jax.gateway.dialects import fields


def count(body: Mapping[str, Any], *, needs: str | None = None) -> int:
  """How many alternatives a request wants beside each token.

  Raises:
    Refusal: it is no such number, or `needs`, which must be true, is not.
  """
  most = api.MOST_TOP_LOGPROBS
  wanted = fields.number(body, "top_logprobs", int, 0, most) or 0
  if wanted and needs is not None and not body.get(needs):
    raise fields.bad("top_logprobs", f"needs {needs} to be true")
  return wanted


def of(
  renderer: render.Renderer,
  token_ids: Sequence[int],
  logprobs: Sequence[float],
  tops: generation.Tops,
) -> list[dict[str, Any]]:
  """Sampled tokens, each with its alternatives; `tops` is empty for none."""
  return [
    {
      **_token(renderer, token, logprob),
      "top_logprobs": [
        _token(renderer, *one) for one in (tops[n] if tops else ())
      ],
    }
    for n, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True))
  ]


def _token(
  renderer: render.Renderer, token: int, logprob: float
) -> dict[str, Any]:
  text = renderer.decode((token,))
  return {"token": text, "bytes": list(text.encode()), "logprob": logprob}
