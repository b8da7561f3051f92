"""Plans which samples share a pack, from their sizes alone.

Samples are numbered in the depth-first order of their forest. A run is a
range of them: it needs the tokens its samples add to one another, and the
ancestors of its first sample, which it replays. A pack holds runs.

1. Cut: the forest becomes runs that fit a pack each, by a shortest path over
   the places where it may be cut. The length of a run is the token slots of
   the smallest shape that holds it, as if it filled a pack alone. Where that
   leaves slots empty, another length is tried: the tokens a run replays, less
   1/64 of its own, so that cheap cuts make small runs, which step 2 combines.
2. Place: runs go into packs, the largest first, each into the first pack that
   holds it. The plan of fewest packs wins, then that of fewest slots.
3. Batch: packs of like cost form a device batch. The last one, which has the
   cheapest, is planned again: all its packs share the work, and the smallest
   shape that can serve does.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools

import numpy as np

TOKENS, EDGES, ROWS, COST = range(4)  # what a run needs and a pack holds

_FREE = 1 / 64  # of a run: the replay that a cut may cost
_GOOD = 1 / 32  # how far from the best a plan may be for others to be tried
_CELLS = 24  # places to cut in a pack's worth of samples
_ROUNDS = 4  # of the search for the last batch's cost

Run = tuple[int, int]  # first sample, and the one after the last
Pack = list[Run]
# Length of runs, float64 [runs], given their needs [4, runs] and how many of
# their tokens are replayed [runs].
Price = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sizes:
  """What the n samples of a forest need, in depth-first order.

  Rows of the arrays are tokens, edges, rows and visible pairs; float64, in
  which such counts are exact.
  """

  total: np.ndarray  # [4, n + 1], the needs of all samples before each
  replay: np.ndarray  # [4, n], of a sample's ancestors, if it opens a run
  flops: np.ndarray  # [4], the cost of one of each

  def needs(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Tokens, edges, rows and cost of runs; float64 [4, runs].

    Edges are bounded from above: by rows, and by the edges of the samples and
    of the replayed ancestors. The rest is exact.
    """
    before = self.total[:, start] - self.replay[:, start]
    return self.between(before, self.total[:, stop])

  def between(self, before: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The same, given what runs need not have and have by their ends."""
    need = total - before
    np.minimum(need[EDGES], need[ROWS], out=need[EDGES])
    need[COST] = self.flops @ need
    return need

  def of(self, runs: Sequence[Run]) -> np.ndarray:
    """The same for a list of runs."""
    start, stop = np.array(runs).T
    return self.needs(start, stop)


def batches(sizes: Sizes, shapes: np.ndarray, packs: int) -> list[list[Pack]]:
  """Groups of at most `packs` packs that hold every sample once.

  Args:
    sizes: of n > 0 samples, each of which fits the largest shape.
    shapes: int [shapes, 3], tokens, edges and rows of a pack, ascending.
    packs: of a device batch.
  """
  limits = np.full((len(shapes), 4), np.inf)
  limits[:, :COST] = shapes
  samples = sizes.replay.shape[1]
  made = _fill(sizes, [(0, samples)], limits)
  cost = [_load(sizes, pack)[COST] for pack in made]
  order = sorted(range(len(made)), key=lambda i: (-cost[i], made[i]))
  groups = [
    [made[i] for i in order[first : first + packs]]
    for first in range(0, len(made), packs)
  ]
  if packs > 1:
    groups[-1] = _spread(sizes, groups[-1], limits, packs)
  return groups


def _fill(
  sizes: Sizes, runs: Sequence[Run], limits: np.ndarray, most: int | None = None
) -> list[Pack]:
  """Packs that hold the runs' samples: the fewest, then of fewest slots.

  Args:
    sizes: of the samples.
    runs: disjoint; they may be cut.
    limits: [shapes, 4], ascending.
    most: any plan of so many packs will do; none: no packs.
  """
  limit = limits[-1]
  least = _once(sizes, runs)[TOKENS]
  best, best_price = [], (np.inf if most is None else most + 1, 0.0)
  for pieces in _tries(sizes, runs, limits):
    need = sizes.of(pieces)
    fewest = _fewest(need, limit)
    if fewest > best_price[0]:
      continue
    made = _place(pieces, need, limit)
    loads = np.stack([_load(sizes, pack) for pack in made], 1)
    price = (len(made), _slots(loads, limits).sum())
    if price < best_price:
      best, best_price = made, price
    good = len(best) == fewest and best_price[1] * (1 - _GOOD) <= least
    if best and (good or most is not None):
      break
  return best


def _once(sizes: Sizes, runs: Sequence[Run]) -> np.ndarray:
  """What runs need in all but for their first samples' ancestors; [4]."""
  start, stop = np.array(runs).T
  return (sizes.total[:, stop] - sizes.total[:, start]).sum(1)


def _fewest(need: np.ndarray, limit: np.ndarray) -> int:
  """Packs that the needs of runs take if no pack has room to spare."""
  return max(1, int(np.ceil(need.sum(1) / limit).max()))


def _load(sizes: Sizes, pack: Pack) -> np.ndarray:
  """What a pack needs at most: its runs may share ancestors."""
  return sizes.of(pack).sum(1)


def _tries(
  sizes: Sizes, runs: Sequence[Run], limits: np.ndarray
) -> Iterator[list[Run]]:
  """The ways to cut runs, each a list of runs."""

  def slots(need, replay):
    del replay
    return _slots(need, limits) + 1e-3 * need[TOKENS]

  def replayed(need, replay):
    return np.maximum(replay - _FREE * need[TOKENS], 0)

  for price in (slots, replayed):
    cuts = [_cut(sizes, run, limits[-1], price) for run in runs]
    yield list(itertools.chain(*cuts))
  # So that a plan never takes more packs than samples placed one by one.
  yield [(i, i + 1) for run in runs for i in range(*run)]


def _slots(need: np.ndarray, limits: np.ndarray) -> np.ndarray:
  """Tokens of the smallest shape that holds each need; inf: none does."""
  shape = (need > limits[:, :, None]).any(1).sum(0)
  return np.append(limits[:, TOKENS], np.inf)[shape]


def _cut(sizes: Sizes, run: Run, limit: np.ndarray, price: Price) -> list[Run]:
  """Cuts a run into runs within the limit that have the least total price.

  Of equal prices, the one with the shortest last run.
  """
  places = _places(sizes, run, limit)
  tokens = sizes.total[TOKENS, places]
  first = np.searchsorted(tokens, tokens - limit[TOKENS]).tolist()
  total, replay = sizes.total[:, places], sizes.replay[:, places[:-1]]
  before = total[:, :-1] - replay
  limit = limit[:, None]
  best = np.zeros(len(places))
  came_from = [0] * len(places)
  for i in range(1, len(places)):
    starts = slice(first[i], i)
    need = sizes.between(before[:, starts], total[:, i : i + 1])
    length = best[starts] + price(need, replay[TOKENS, starts])
    length[(need > limit).any(0)] = np.inf
    back = int(length[::-1].argmin())
    best[i], came_from[i] = length[-1 - back], i - 1 - back
  runs, i = [], len(places) - 1
  while i:
    runs.append((int(places[came_from[i]]), int(places[i])))
    i = came_from[i]
  return runs[::-1]


def _places(sizes: Sizes, run: Run, limit: np.ndarray) -> np.ndarray:
  """Where a run may be cut: its ends and a bounded number between.

  Of the samples that together fill a small part of a pack, the one whose
  ancestors are fewest, if the runs between such cuts fit; else, all samples of
  a run.
  """
  start, stop = run
  # The largest of the shares that a sample adds of a pack's limits.
  share = np.diff(sizes.total[:COST, start : stop + 1]) / limit[:COST, None]
  before = np.cumsum(share.max(0)) - share.max(0)
  cell = (before * _CELLS).astype(np.int64)
  order = np.lexsort((sizes.replay[TOKENS, start:stop], cell))
  lead = np.flatnonzero(np.diff(cell[order], prepend=-1))
  places = np.unique(np.concatenate([[start], order[lead] + start, [stop]]))
  over = (sizes.needs(places[:-1], places[1:]) > limit[:, None]).any(0)
  between = [np.arange(*places[i : i + 2]) for i in np.flatnonzero(over)]
  return np.unique(np.concatenate([places, *between]))


def _place(
  runs: Sequence[Run], need: np.ndarray, limit: np.ndarray
) -> list[Pack]:
  """Places runs, the largest first, in the first pack that holds each."""
  left = np.empty((4, len(runs)))  # of each pack
  packs: list[Pack] = []
  columns = need.T.copy()[:, :, None]
  starts = [start for start, _ in runs]
  for i in np.lexsort((starts, -need[TOKENS])).tolist():
    fits = (left[:, : len(packs)] >= columns[i]).all(0)
    chosen = int(fits.argmax()) if fits.any() else len(packs)
    if chosen == len(packs):
      left[:, chosen] = limit
      packs.append([])
    left[:, chosen] -= need[:, i]
    packs[chosen].append(runs[i])
  return [_joined(pack) for pack in packs]


def _joined(runs: Sequence[Run]) -> list[Run]:
  """The runs in order, neighbours made one."""
  out: list[Run] = []
  for start, stop in sorted(runs):
    if out and out[-1][1] == start:
      start = out.pop()[0]
    out.append((start, stop))
  return out


def _spread(
  sizes: Sizes, group: Sequence[Pack], limits: np.ndarray, packs: int
) -> list[Pack]:
  """Plans the last batch's packs again, to share their work evenly.

  Finds the smallest shape for which at most `packs` packs suffice, then by
  bisection nearly the least cost of a pack for which they do.
  """
  runs = _joined([run for pack in group for run in pack])
  samples = np.concatenate([np.arange(*run) for run in runs])
  alone = sizes.needs(samples, samples + 1).max(1)
  once = _once(sizes, runs)
  best, need = list(group), _worst(sizes, group)
  for limit in limits:
    if (need <= limit).all():
      break
    if (alone <= limit).all() and once[TOKENS] <= packs * limit[TOKENS]:
      made = _fill(sizes, runs, limit[None], packs)
      if made:
        best, need = made, _worst(sizes, made)
        break
  low = max(alone[COST], sizes.flops @ once / packs)
  limit = limit.copy()
  for _ in range(_ROUNDS):
    if need[COST] <= low * (1 + _GOOD):
      break
    # A little over, so that rounding forbids no run that should fit.
    limit[COST] = (low + need[COST]) / 2 * (1 + 1e-9)
    made = _fill(sizes, runs, limit[None], packs)
    if made:
      best, need = made, _worst(sizes, made)
    else:
      low = limit[COST]
  return best


def _worst(sizes: Sizes, packs: Sequence[Pack]) -> np.ndarray:
  """The most that any pack needs of each; [4]."""
  return np.max([_load(sizes, pack) for pack in packs], axis=0)
