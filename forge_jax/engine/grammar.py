"""Grammars: which tokens may come next in a response; on the host.

A grammar is text in llguidance's variant of Lark. It may embed JSON schemas
(`%json {...}`) and name tokens by their ids (`<[151657]>`). It is about the
response's text but for the stop token: where the grammar can be at its end, the
request's stop tokens are allowed, and nowhere else.

Invariants of a `Progress`: its mask is of the next token to be sampled, and
allows at least one, unless `error` says why there can be none.
"""

from collections.abc import Sequence
import copy
import functools

import llguidance
import llguidance.numpy
import numpy as np
import transformers

from forge_jax import errors


class Progress:
  """How far one response has come in its grammar."""

  def __init__(
    self,
    matcher: llguidance.LLMatcher,
    vocab_size: int,
    stop_token_ids: Sequence[int],
    eos_token_ids: Sequence[int],
  ):
    self._matcher = matcher
    self._stops = np.asarray(stop_token_ids, np.int64)
    self._ends = np.asarray(eos_token_ids, np.int64)
    self.error: str | None = None
    # uint32 [ceil(V / 32)]: bit t % 32 of word t // 32 is that of token t.
    self.allowed = np.zeros(-(-vocab_size // 32), np.uint32)

  def ahead(self, tokens: Sequence[int]) -> list[np.ndarray | None]:
    """Masks of the next token, and of that after each of some that may come.

    None after a token that cannot come, or that would end the response.
    """
    twin = copy.copy(self)
    twin._matcher = self._matcher.deep_copy()
    masks: list[np.ndarray | None] = [self.allowed]
    for token in tokens:
      allowed = twin.allowed[token // 32] & _bit(np.int64(token))
      if twin.error is not None or not allowed or token in self._stops:
        break
      advance([twin], [token])
      masks.append(twin.allowed)
    return masks + [None] * (1 + len(tokens) - len(masks))

  def _settle(self) -> None:
    """Checks a mask that has been computed; sees to the stop tokens."""
    words = self.allowed
    words[self._ends // 32] &= ~_bit(self._ends)
    if self._matcher.is_accepting():
      np.bitwise_or.at(words, self._stops // 32, _bit(self._stops))
    else:
      np.bitwise_and.at(words, self._stops // 32, ~_bit(self._stops))
    if self._matcher.is_error():
      self.error = self._matcher.get_error()
    elif not words.any():
      self.error = "no token of the vocabulary can continue the response"


class Grammars:
  """Compiles grammars for the vocabulary of one model."""

  def __init__(
    self, tokenizer: transformers.PreTrainedTokenizerFast, vocab_size: int
  ):
    """Holds a fast tokenizer and the number of the model's logits."""
    self._tokenizer = tokenizer
    self._vocab_size = vocab_size

  def start(self, text: str, stop_token_ids: Sequence[int]) -> Progress:
    """Compiles a grammar; may take a second, and be called from any thread.

    Args:
      text: the grammar.
      stop_token_ids: those of the request.

    Raises:
      GrammarError: it is malformed, or larger than llguidance's limits, or no
        response can follow it; the message says what is wrong.
    """
    if not stop_token_ids:
      raise errors.GrammarError("a grammar needs a stop token to end with")
    progress = Progress(
      self._compile(text),
      self._vocab_size,
      stop_token_ids,
      self._vocabulary.eos_tokens,
    )
    _fill([progress])
    if progress.error is not None:
      raise errors.GrammarError(progress.error)
    return progress

  def follows(self, text: str, tokens: Sequence[int], whole: bool) -> bool:
    """Whether tokens without a stop token are of a grammar, or begin to be.

    Args:
      text: the grammar.
      tokens: of a response.
      whole: whether they must be all of it.

    Raises:
      GrammarError: the grammar is malformed.
    """
    matcher = self._compile(text)
    if matcher.try_consume_tokens(list(tokens)) < len(tokens):
      return False
    return matcher.is_accepting() or not whole

  def _compile(self, text: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(self._vocabulary, text, log_level=0)
    if matcher.is_error():
      raise errors.GrammarError(matcher.get_error())
    return matcher

  @functools.cached_property
  def _vocabulary(self) -> llguidance.LLTokenizer:
    # Half a second for 50,000 tokens: only where a grammar is asked for.
    backend = copy.copy(self._tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return llguidance.LLTokenizer(
      backend.to_str(),
      n_vocab=self._vocab_size,
      eos_token=self._tokenizer.eos_token_id,
    )


def advance(progresses: Sequence[Progress], tokens: Sequence[int]) -> None:
  """Takes each response's sampled token and computes its next mask.

  A stop token is not to be given: the response has ended. A failure is found in
  the `error` of the progress, and concerns that response only.
  """
  if progresses:
    pairs = [
      (p._matcher, int(t)) for p, t in zip(progresses, tokens, strict=True)
    ]
    _executor().consume_token_par(pairs)
    _fill(progresses)


def _fill(progresses: Sequence[Progress]) -> None:
  words = np.zeros((len(progresses), len(progresses[0].allowed)), np.uint32)
  llguidance.numpy.fill_next_token_bitmask_par(
    _executor(),
    [(p._matcher, row) for row, p in enumerate(progresses)],
    words.view(np.int32),
  )
  for progress, row in zip(progresses, words, strict=True):
    progress.allowed = row
    progress._settle()


@functools.cache
def _executor() -> llguidance.LLExecutor:
  return llguidance.LLExecutor()


def _bit(tokens: np.ndarray) -> np.ndarray:
  return np.left_shift(np.uint32(1), (tokens % 32).astype(np.uint32))
