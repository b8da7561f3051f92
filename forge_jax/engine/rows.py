"""Requests as the rows of a step's batch."""

from collections.abc import Sequence
import functools

import numpy as np

from forge_jax.engine import batch, grammar, sampling
from forge_jax.engine import scheduler as scheduler_lib


def make(
  step: scheduler_lib.Step, progress: dict[str, grammar.Progress]
) -> tuple[list[batch.Row], list[batch.Row]]:
  """The decoding rows and the blocks of a step.

  Args:
    step: from the scheduler.
    progress: of the requests that have a grammar, by their ids.
  """
  return [
    _row(
      live,
      live.response[-1:],
      live.committed,
      drafts=drafts,
      progress=progress.get(live.request.id),
    )
    for live, drafts in zip(step.decode, step.drafts, strict=True)
  ], [
    _row(
      block.live,
      block.tokens,
      block.start,
      sample=block.last,
      progress=progress.get(block.live.request.id),
    )
    for block in step.blocks
  ]


def _row(
  live: scheduler_lib.LiveRequest,
  tokens: Sequence[int],
  start: int,
  *,
  drafts: int = 0,
  sample: bool = True,
  progress: grammar.Progress | None,
) -> batch.Row:
  params = live.request.sampling
  greedy = params.temperature == 0
  shaped = sample and live.stepwise
  return batch.Row(
    pages=live.lease.pages,
    tokens=tokens,
    start=start,
    seed=params.seed & 0xFFFFFFFF,
    temperature=params.temperature,
    top_k=0 if greedy else params.top_k,
    top_p=1.0 if greedy else params.top_p,
    min_p=0.0 if greedy else params.min_p,
    drafts=drafts,
    shapes=functools.partial(_shapes, live, progress) if shaped else None,
  )


def _shapes(
  live: scheduler_lib.LiveRequest,
  progress: grammar.Progress | None,
  drafts: Sequence[int],
) -> list[sampling.Shape | None]:
  """Shapes of the next token, and of that after each of its drafts."""
  masks = progress.ahead(drafts) if progress else [None] * (1 + len(drafts))
  prompt = np.asarray(live.prompt, np.int32)
  return [
    sampling.Shape.make(
      live.request.sampling, prompt, [*live.response, *drafts[:n]], mask
    )
    for n, mask in enumerate(masks)
  ]
