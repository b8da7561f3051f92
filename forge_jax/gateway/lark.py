"""Writes grammars in llguidance's variant of Lark, one rule a line.

Nothing here knows llguidance: the engine does. A rule that embeds what a client
has sent is noted with what is to blame if the engine refuses its line.
"""

from collections.abc import Mapping
import json
import re
from typing import Any

from forge_jax.gateway import refusal

TEXT = "/(?s:.+)/"  # any text but the empty one, without special tokens
# Between the tokens of JSON: a line break with its indentation, or a space at
# most. Models that may write as much white space as they like do.
_SPACE = "\\n {0,32}| ?"


class Writer:
  """A grammar that is being written."""

  def __init__(self, special: Mapping[str, int]):
    """Begins a grammar; `special` tokens are spelled as tokens, by their id."""
    self._special = special
    self._pattern = re.compile(
      "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"\Z."
    )
    self._lines = ["%llguidance {}"]
    self.blame: dict[int, tuple[str, str]] = {}  # line, from 1 -> parameter

  def rule(
    self,
    body: str,
    *,
    lazy: bool = False,
    blame: tuple[str, str] | None = None,
  ) -> str:
    """Adds a rule; returns its name.

    Args:
      body: what it stands for.
      lazy: whether a pattern ends where it first can.
      blame: the client's parameter and what of it the rule holds.
    """
    name = f"rule_{len(self._lines)}"
    for line in f"{name}{'[lazy]' if lazy else ''}: {body}".split("\n"):
      self._lines.append(line)
      if blame is not None:
        self.blame[len(self._lines)] = blame
    return name

  def spell(self, text: str) -> str:
    """A text as it is, special tokens as tokens; nothing for an empty text."""
    pieces, end = [], 0
    for found in self._pattern.finditer(text):
      pieces += [quote(text[end : found.start()])]
      pieces += [f"<[{self._special[found[0]]}]>"]
      end = found.end()
    return " ".join(piece for piece in (*pieces, quote(text[end:])) if piece)

  def until(self, end: str) -> str:
    """Adds a rule of any text up to the first `end`, which comes with it.

    An `end` with a special token ends where that is; an empty one anywhere.
    """
    found = self._pattern.search(end)
    before = end[: found.start()] if found else end
    if not before:
      return f"{TEXT}? {self.spell(end)}".rstrip()
    pattern = re.escape(before).replace("/", r"\/").replace("\n", "n")
    text = self.rule(f"/(?s:.*){pattern}/", lazy=found is None)
    return f"{text} {self.spell(end[len(before) :])}".rstrip()

  def json(
    self,
    schema: Mapping[str, Any],
    blame: tuple[str, str],
    *,
    lenient: bool = False,
  ) -> str:
    """Adds a rule of JSON that follows a schema.

    Args:
      schema: a JSON schema.
      blame: see `rule`.
      lenient: whether keywords that the engine does not know are overlooked.

    Raises:
      Refusal: no JSON text can be made of the schema.
    """
    options = {"whitespace_pattern": _SPACE, "lenient": lenient}
    try:
      text = json.dumps({**schema, "x-guidance": options}, allow_nan=False)
    except (ValueError, RecursionError) as error:
      raise refusal.Refusal(
        f"{blame[0]}: {blame[1]} cannot be read: {error}", param=blame[0]
      ) from error
    return self.rule(f"%json {text}", blame=blame)

  def lark(self, grammar: str, blame: tuple[str, str]) -> str:
    """Adds a rule of a text that follows a grammar of its own, in Lark."""
    return self.rule(f"%lark {{\n{grammar}\n}}", blame=blame)

  def text(self, start: str) -> str:
    """The whole grammar, whose replies are those of `start`."""
    return "\n".join([*self._lines, f"start: {start}"])


def quote(text: str) -> str:
  """A text as it is; nothing for an empty text."""
  return json.dumps(text, ensure_ascii=False) if text else ""
