"""Small functions to break and repair, each with a maker of its arguments.

Invariant: every loop is a `for` over something finite that the loop does not
extend, and nothing recurses, so that a function ends however its comparisons,
operators and constants are changed.
"""

from collections.abc import Callable
import dataclasses
import random
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Specimen:
  """A function and what it is called with."""

  function: Callable[..., Any]
  arguments: Callable[[random.Random], tuple[Any, ...]]  # JSON values
  split: str  # the split whose tasks may be about it


def running_maximum(numbers):
  """The largest number so far, at every place."""
  result = []
  best = None
  for number in numbers:
    if best is None or number > best:
      best = number
    result.append(best)
  return result


def count_vowels(text):
  """How many of a text's letters are vowels, in either case."""
  count = 0
  for letter in text.lower():
    if letter in "aeiou":
      count += 1
  return count


def run_lengths(text):
  """Each run of equal letters as [letter, length]."""
  runs = []
  for letter in text:
    if runs and runs[-1][0] == letter:
      runs[-1][1] += 1
    else:
      runs.append([letter, 1])
  return runs


def second_largest(numbers):
  """The second largest of the distinct numbers; None if there is none."""
  distinct = sorted(set(numbers))
  if len(distinct) < 2:
    return None
  return distinct[-2]


def count_between(numbers, low, high):
  """How many of the numbers are at least low and at most high."""
  count = 0
  for number in numbers:
    if number >= low and number <= high:
      count += 1
  return count


def balanced(text):
  """Whether round brackets are closed in the right order."""
  depth = 0
  for letter in text:
    if letter == "(":
      depth += 1
    elif letter == ")":
      depth -= 1
      if depth < 0:
        return False
  return depth == 0


def moving_sums(numbers, width):
  """The sums of all windows of a width."""
  sums = []
  for start in range(len(numbers) - width + 1):
    total = 0
    for offset in range(width):
      total += numbers[start + offset]
    sums.append(total)
  return sums


def even_digit_sum(number):
  """The sum of a whole number's even decimal digits, sign left out."""
  total = 0
  for digit in str(abs(number)):
    if int(digit) % 2 == 0:
      total += int(digit)
  return total


def merge_sorted(left, right):
  """Two sorted lists as one sorted list."""
  merged = []
  place = 0
  for number in left:
    for other in right[place:]:
      if other >= number:
        break
      merged.append(other)
      place += 1
    merged.append(number)
  return merged + right[place:]


def word_lengths(text):
  """How many words there are of each length, shortest first."""
  counts = {}
  for word in text.split():
    counts[len(word)] = counts.get(len(word), 0) + 1
  return [[length, counts[length]] for length in sorted(counts)]


def longest_rise(numbers):
  """The length of the longest stretch in which every number is larger."""
  best = 0
  length = 0
  previous = None
  for number in numbers:
    if previous is not None and number > previous:
      length += 1
    else:
      length = 1
    if length > best:
      best = length
    previous = number
  return best


def rotate(items, steps):
  """The items, moved to the right by steps places, round the end."""
  if not items:
    return []
  cut = steps % len(items)
  return items[len(items) - cut :] + items[: len(items) - cut]


def is_leap(year):
  """Whether a year of the Gregorian calendar is a leap year."""
  return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def transpose(rows):
  """The columns of a rectangular table as rows."""
  if not rows:
    return []
  table = []
  for column in range(len(rows[0])):
    table.append([row[column] for row in rows])
  return table


def change(amount, coins):
  """How many of each coin, the first first, greedily."""
  counts = []
  for coin in coins:
    counts.append(amount // coin)
    amount = amount % coin
  return counts


def common_prefix(words):
  """The longest text that all words begin with."""
  if not words:
    return ""
  prefix = ""
  for place in range(min(len(word) for word in words)):
    letter = words[0][place]
    for word in words[1:]:
      if word[place] != letter:
        return prefix
    prefix = prefix + letter
  return prefix


def _numbers(rng: random.Random) -> list[int]:
  return [rng.randrange(-9, 10) for _ in range(rng.randrange(8))]


def _text(rng: random.Random, letters: str) -> str:
  return "".join(rng.choice(letters) for _ in range(rng.randrange(12)))


def _table(rng: random.Random) -> list[list[int]]:
  width = rng.randrange(1, 4)
  return [
    [rng.randrange(10) for _ in range(width)] for _ in range(rng.randrange(4))
  ]


def _words(rng: random.Random) -> list[str]:
  start = _text(rng, "ab")
  return [start + _text(rng, "abc") for _ in range(rng.randrange(4))]


SPECIMENS = {
  one.function.__name__: one
  for one in (
    Specimen(running_maximum, lambda r: (_numbers(r),), "train"),
    Specimen(count_vowels, lambda r: (_text(r, "aeiouAbcd "),), "train"),
    Specimen(run_lengths, lambda r: (_text(r, "ab"),), "train"),
    Specimen(second_largest, lambda r: (_numbers(r),), "train"),
    Specimen(
      count_between,
      lambda r: (_numbers(r), r.randrange(-5, 0), r.randrange(6)),
      "train",
    ),
    Specimen(balanced, lambda r: (_text(r, "()"),), "train"),
    Specimen(moving_sums, lambda r: (_numbers(r), r.randrange(1, 4)), "train"),
    Specimen(even_digit_sum, lambda r: (r.randrange(-999, 9999),), "train"),
    Specimen(
      merge_sorted,
      lambda r: (sorted(_numbers(r)), sorted(_numbers(r))),
      "train",
    ),
    Specimen(word_lengths, lambda r: (_text(r, "abc  "),), "train"),
    Specimen(change, lambda r: (r.randrange(200), [50, 20, 5, 1]), "train"),
    Specimen(longest_rise, lambda r: (_numbers(r),), "heldout"),
    Specimen(rotate, lambda r: (_numbers(r), r.randrange(9)), "heldout"),
    Specimen(
      is_leap,
      lambda r: (r.choice((4, 100, 400, 7)) * r.randrange(1, 9),),
      "heldout",
    ),
    Specimen(transpose, lambda r: (_table(r),), "heldout"),
    Specimen(common_prefix, lambda r: (_words(r),), "heldout"),
  )
}
