"""The obvious prefix cache: every sequence ever committed, compared in turn."""


class NaiveCache:
  """Unlimited, and slow; the radix tree must find as much as this."""

  def __init__(self):
    self._sequences = []

  def commit(self, tokens):
    """Adds a whole sequence."""
    self._sequences.append(list(tokens))

  def shared(self, tokens):
    """Longest common prefix with any sequence, but for the last token."""
    return max((self._common(s, tokens) for s in self._sequences), default=0)

  def forget(self):
    self._sequences.clear()

  def _common(self, sequence, tokens):
    count = 0
    for a, b in zip(sequence, tokens[:-1], strict=False):
      if a != b:
        break
      count += 1
    return count
