"""The raw prompts of a session, found again when a new one extends them.

Invariants:
  1. Only what was delivered is indexed: a prompt with the whole text of its
     reply, and the ids of a prompt with those of its response.
  2. An index holds a digest per completion, never the prompt itself. A search
     reads the new prompt once, whatever the number of completions.
"""

import bisect
from collections.abc import Sequence
import hashlib
from typing import Any

import numpy as np

from forge_jax.gateway import refusal, render

# A raw prompt: its text, or its token ids.
Prompt = str | tuple[int, ...]


class RawPrompts:
  """Finds the completion that a raw prompt goes on from."""

  def __init__(self):
    """Begins empty."""
    self._by_text = _PrefixIndex()
    self._by_ids = _PrefixIndex()

  def add(self, prompt: Prompt, text: str, node: Any) -> None:
    """Indexes a completion.

    Args:
      prompt: what the client sent.
      text: the reply that the client is given.
      node: the recorded completion, a forest.Node.
    """
    if isinstance(prompt, str):
      self._by_text.add((prompt + text).encode(), (node, text))
    self._by_ids.add(_bytes(node.token_ids()), (node, None))

  def find(
    self, renderer: render.Renderer, prompt: Prompt
  ) -> tuple[Any | None, list[int], list[int]]:
    """Where a prompt belongs.

    Args:
      renderer: encodes and decodes, a render.Renderer.
      prompt: what the client sends.

    Returns:
      The recorded completion that it extends, or None; the ids that it keeps of
      that completion's response; the ids that follow them.

    Raises:
      Refusal: there is no token of such an id.
    """
    if not isinstance(prompt, str):
      return self._find_ids(prompt, renderer.vocabulary_size)
    data = prompt.encode()
    length, found = self._by_text.longest(data)
    if found is None:
      return None, [], renderer.encode_prompt(prompt)
    node, text = found
    rest = text + data[length:].decode()
    sampled = node.response_ids.tolist()
    kept, shown = _shown(renderer, sampled, rest)
    if not kept:  # the reply was empty: there is nothing to keep
      return None, [], renderer.encode_prompt(prompt)
    return node, sampled[:kept], renderer.encode_rest(rest[len(shown) :])

  def _find_ids(
    self, prompt: Sequence[int], vocabulary_size: int
  ) -> tuple[Any | None, list[int], list[int]]:
    if max(prompt) >= vocabulary_size:
      raise refusal.Refusal(
        f"prompt: {max(prompt)} is no token id; ids end at "
        f"{vocabulary_size - 1}",
        param="prompt",
      )
    length, found = self._by_ids.longest(_bytes(prompt))
    if found is None:
      return None, [], list(prompt)
    node, _ = found
    return node, node.response_ids.tolist(), list(prompt[length // 4 :])


class _PrefixIndex:
  """Byte strings with a value each; finds the longest that begins another."""

  def __init__(self):
    self._values: dict[bytes, Any] = {}  # digest -> the latest value
    self._lengths: list[int] = []  # ascending, each once

  def add(self, data: bytes, value: Any) -> None:
    self._values[_digest(data).digest()] = value
    at = bisect.bisect_left(self._lengths, len(data))
    if at == len(self._lengths) or self._lengths[at] != len(data):
      self._lengths.insert(at, len(data))

  def longest(self, data: bytes) -> tuple[int, Any | None]:
    """The length and the value of the longest entry that begins `data`."""
    best, read, digest = (0, None), 0, _digest(b"")
    view = memoryview(data)
    for length in self._lengths:
      if length > len(data):
        break
      digest.update(view[read:length])
      read = length
      value = self._values.get(digest.copy().digest())
      if value is not None:
        best = length, value
    return best


def _shown(
  renderer: render.Renderer, sampled: Sequence[int], text: str
) -> tuple[int, str]:
  """How many of the sampled ids `text` begins with, and their text."""
  for count in range(len(sampled), 0, -1):
    shown = renderer.decode(sampled[:count])
    if text.startswith(shown):
      return count, shown
  return 0, ""


def _digest(data: bytes) -> "hashlib._Hash":
  return hashlib.blake2b(data, digest_size=16)


def _bytes(ids: Sequence[int] | np.ndarray) -> bytes:
  return np.asarray(ids, np.int32).tobytes()
