"""What ends a response besides its stop tokens and its length."""

from collections.abc import Callable, Sequence
import math

from forge_jax import types
from forge_jax.engine import config as config_lib
from forge_jax.engine import scheduler


def stop_string(
  live: scheduler.LiveRequest, decode_text: Callable[[Sequence[int]], str]
) -> types.StopReason | None:
  """Whether the newest token completes one of the request's stop strings."""
  stops = live.request.sampling.stop_strings
  if not stops:
    return None
  # A token is at least a byte: the newest token completes a stop string only
  # within this many tokens.
  reach = max(len(stop.encode()) for stop in stops) + 1
  text = decode_text(live.response[-reach:])
  return types.StopReason.STOP if any(s in text for s in stops) else None


def early_stop(
  live: scheduler.LiveRequest, logprob: float, config: config_lib.EngineConfig
) -> types.StopReason | None:
  """Cuts off a response that has long been certain: it repeats itself."""
  sure = logprob > math.log(config.early_stop_probability)
  live.sure = live.sure + 1 if sure else 0
  return (
    types.StopReason.LENGTH
    if 0 < config.early_stop_tokens <= live.sure
    else None
  )
