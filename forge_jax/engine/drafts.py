"""Drafting tokens with a model's modules (`model/mtp.py`), over pages.

A module reads a token and the state of the one before it: the trunk's, or that
of the module before. Its layer is one more layer of the paged cache, and its
pages also hold the states that it reads. So what is kept of a prefix depends on
the prefix alone: it is found, shared, moved and evicted with the rest.

A step's tokens go through the modules as through the trunk (`keep`). Nobody
reads what the last module says of them, so XLA drops all of it but the keys and
values. What a draft that is rejected left in a page is garbage past the
committed length, as it is in the trunk's layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from forge_jax.engine import attention
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import rope


class ModuleCache(NamedTuple):
  """The pages of one module."""

  layer: attention.Cache
  state_PSD: jax.Array  # of each token, for the module to read at the next


def keep(
  decoder: decoder_lib.UnrolledDecoder,
  caches: Sequence[ModuleCache],
  attends: Sequence[attention.Paged],
  token_T: jax.Array,
  position_T: jax.Array,
  hidden_TD: jax.Array,
  at: tuple[jax.Array, jax.Array],
  before: tuple[jax.Array, jax.Array],
) -> list[ModuleCache]:
  """The modules' pages with a step's tokens added.

  Args:
    decoder: with as many modules as caches.
    caches: before the step.
    attends: of each module's layer.
    token_T: int32.
    position_T: int32.
    hidden_TD: the trunk's, of the tokens.
    at: page and offset of each token.
    before: page and offset of the token before it.
  """
  angles = rope.angles(decoder.config, position_T)
  embedded_TD = decoder.embed(token_T, decoder.dtype)
  first_T1 = (position_T == 0)[:, None]
  state_TD, kept = hidden_TD, []
  for module, cache, attend in zip(decoder.mtp, caches, attends, strict=True):
    state_PSD = cache.state_PSD.at[at].set(state_TD, mode="drop")
    before_TD = state_PSD.at[before].get(mode="clip")
    before_TD = jnp.where(first_T1, jnp.zeros((), state_TD.dtype), before_TD)
    state_TD = module(embedded_TD, before_TD, angles, attend)
    kept.append(ModuleCache(attend.cache, state_PSD))
  return kept


def draft(
  decoder: decoder_lib.UnrolledDecoder,
  attend: Callable[..., attention.Paged],
  caches: Sequence[ModuleCache],
  rows: attention.Rows,
  sample: Callable[[jax.Array, jax.Array], jax.Array],
  count: int,
) -> tuple[jax.Array, list[ModuleCache]]:
  """Drafts the tokens that follow each row's.

  Module n drafts token n, for which it runs on the row's token and the drafts
  before its own. When there are no more modules, the last one goes on, reading
  its own states.

  Args:
    decoder: with one module at least.
    attend: makes a layer's attention of its cache, where its tokens go, and
      the rows of few and of many tokens.
    caches: of the modules, up to the row's token.
    rows: D rows of one token, whose `length_R` counts it and the drafts that
      the row has room for.
    sample: draws a token a row from logits [D, V], for positions [D].
    count: how many to draft.

  Returns:
    int32 [D, 1 + count], each row's token and its drafts; the caches.
  """
  caches = list(caches)
  pages, page = caches[0].state_PSD.shape[:2]
  none = jax.tree.map(lambda x: x[:0], rows)
  tokens, state_DWD = [rows.token_RW[:, 0]], None
  for n in range(count):
    number = min(n, len(caches) - 1)
    width = n + 1 if n == number else 1
    skip = n + 1 - width
    some = attention.Rows(
      jnp.stack(tokens[-width:], axis=1),
      rows.start_R + skip,
      jnp.clip(rows.length_R - skip, 0, width),
      rows.table_RN,
    )
    cache = caches[number]
    if n == number:
      stored = cache.state_PSD.at[rows.places(page, pages, back=1)]
      before = [stored.get(mode="clip")[:, None]]
      before_DWD = jnp.concatenate(
        before if state_DWD is None else [*before, state_DWD], axis=1
      )
    else:
      before_DWD = state_DWD[:, -1:]
    paged = attend(cache.layer, some.places(page, pages), some, none)
    state_TD = decoder.mtp[number](
      decoder.embed(some.token_RW.reshape(-1), decoder.dtype),
      before_DWD.reshape(-1, before_DWD.shape[-1]),
      rope.angles(decoder.config, some.position_RW.reshape(-1)),
      paged,
    )
    caches[number] = ModuleCache(paged.cache, cache.state_PSD)
    state_DWD = state_TD.reshape(before_DWD.shape)
    logits_DV = decoder.logits(state_DWD[:, -1])
    tokens.append(sample(logits_DV, rows.start_R + n + 1))
  return jnp.stack(tokens, axis=1), caches
