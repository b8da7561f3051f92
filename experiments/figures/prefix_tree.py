"""The pictures of docs/prefix_tree.md, drawn from what the code computes.

Question: what do requests share, what does a token see once they are merged,
and how does the saving grow with the turns of an episode?

Command: python -m experiments.figures.prefix_tree [--folder=docs/images]
Hardware: any; a few seconds.
Result: prefix_tree_merge.svg, prefix_tree_mask.svg, prefix_tree_turns.svg.

The forests come from `tree.merge`, the visited blocks from `tree.layout`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

from matplotlib import axes, collections, figure, patches
import numpy as np

from experiments.figures import drawing
from forge_jax import types
from forge_jax.tree import layout, merge

PROMPT, OBSERVATION, RESPONSE = "#b8c4d6", "#f2c94c", "#2f9e78"
# The kind of a token can be read off its id.
KIND = 1000
KINDS = (PROMPT, OBSERVATION, RESPONSE)


@dataclasses.dataclass(frozen=True)
class Request:
  """One request to the model and what was sampled for it."""

  name: str
  tokens: np.ndarray  # int [length], prompt and response
  response: np.ndarray  # int, the last of them


class Writer:
  """Makes tokens that never meet by chance, unless made from one seed."""

  def __init__(self):
    self._next = [kind * KIND for kind in range(len(KINDS))]

  def __call__(self, color: str, size: int) -> np.ndarray:
    kind = KINDS.index(color)
    start = self._next[kind]
    self._next[kind] += size
    return np.arange(start, start + size)


def group(
  rollouts: int, turns: int, sizes: Mapping[str, int], *, compact: bool
) -> list[Request]:
  """A group's requests; the last history may be replaced by a summary."""
  new = Writer()
  prompt, result = new(PROMPT, sizes["prompt"]), []
  for rollout in range(rollouts):
    history = prompt
    for turn in range(turns):
      if compact and (rollout, turn) == (rollouts - 1, turns - 1):
        summary = new(OBSERVATION, sizes["summary"])
        history = np.concatenate([prompt, summary])
      response = new(RESPONSE, sizes["response"])
      history = np.concatenate([history, response])
      result.append(Request(f"{'abcd'[rollout]}{turn + 1}", history, response))
      observation = new(OBSERVATION, sizes["observation"])
      history = np.concatenate([history, observation])
  return result


def merge_picture() -> figure.Figure:
  """Requests as rows, and the tree they merge into."""
  sizes = {"prompt": 9, "response": 3, "observation": 3, "summary": 4}
  requests = group(2, 3, sizes, compact=True)
  tree = merge.merge([request.tokens for request in requests])
  total = sum(len(request.tokens) for request in requests)
  canvas = drawing.canvas(7.4, 4.1)
  rows, merged = canvas.subplots(2, 1, height_ratios=[7, 4.4])
  _draw_rows(rows, requests)
  rows.set_title(f"{len(requests)} requests, {total} tokens", **drawing.title())
  lanes = _draw_tree(merged, tree, requests)
  merged.set_title(
    f"merged: {len(tree.tokens_T)} tokens, each computed once",
    **drawing.title(),
  )
  width = max(len(request.tokens) for request in requests)
  for ax, height in ((rows, len(requests)), (merged, lanes)):
    ax.set(xlim=(-2.2, width + 2.2), ylim=(height - 0.4, -0.6), aspect="equal")
    ax.axis("off")
  names = ("prompt", "observation, summary", "response")
  handles = [
    patches.Patch(color=color, label=name)
    for color, name in zip(KINDS, names, strict=True)
  ]
  handles.append(
    patches.Patch(facecolor="white", edgecolor=drawing.INK, label="trained")
  )
  canvas.legend(
    handles=handles,
    loc="outside lower center",
    ncols=4,
    frameon=False,
    fontsize=8.5,
    labelcolor=drawing.INK,
  )
  return canvas


def _cell(
  ax: axes.Axes, x: float, y: float, token: int, *, trained: bool, seen: bool
) -> None:
  ax.add_patch(
    patches.Rectangle(
      (x - 0.42, y - 0.42),
      0.84,
      0.84,
      facecolor=KINDS[int(token) // KIND],
      alpha=0.3 if seen else 1.0,
      linewidth=0,
    )
  )
  if trained:
    ax.add_patch(
      patches.Rectangle(
        (x - 0.42, y - 0.42),
        0.84,
        0.84,
        fill=False,
        ec=drawing.INK,
        linewidth=1.1,
      )
    )


def _draw_rows(ax: axes.Axes, requests: Sequence[Request]) -> None:
  """A row a request; pale: an earlier row holds the same prefix."""
  for y, request in enumerate(requests):
    tokens = request.tokens
    seen = max(
      (merge.common_prefix(r.tokens, tokens) for r in requests[:y]), default=0
    )
    for x, token in enumerate(tokens):
      trained = x >= len(tokens) - len(request.response)
      _cell(ax, x, y, token, trained=trained, seen=x < seen)
    ax.text(
      -0.9,
      y,
      request.name,
      ha="right",
      va="center",
      **drawing.label(),
    )


def _draw_tree(
  ax: axes.Axes, tree: types.PrefixTree, requests: Sequence[Request]
) -> int:
  """The tree by depth, a lane for each branch; returns the lanes."""
  trained = np.concatenate([request.response for request in requests])
  lane, lanes = np.zeros(len(tree.tokens_T), int), 0
  for i, (token, depth, parent) in enumerate(
    zip(tree.tokens_T, tree.position_T, tree.parent_T, strict=True)
  ):
    if parent == i - 1:  # the branch goes on
      lane[i] = lane[i - 1] if i else 0
    else:
      lanes += 1
      lane[i] = lanes
      x, y = depth - 0.5, lane[parent]
      ax.plot(
        [x, x, x + 0.1], [y, lanes, lanes], color=drawing.INK, linewidth=1.4
      )
    _cell(ax, depth, lane[i], token, trained=token in trained, seen=False)
  for y in range(lanes + 1):
    held = tree.tokens_T[lane == y]
    ends = [r.name for r in requests if r.tokens[-1] in held]
    x = tree.position_T[lane == y].max() + 0.8
    ax.text(x, y, ", ".join(ends), va="center", **drawing.label())
  return lanes + 1


def mask_picture(block: int = 8) -> figure.Figure:
  """Which key each query sees, and the blocks that are computed."""
  sizes = {"prompt": 21, "response": 7, "observation": 9}
  requests = group(4, 2, sizes, compact=False)
  tree = merge.merge([request.tokens for request in requests])
  tokens = len(tree.tokens_T)
  size = -(-tokens // block) * block
  end_T = np.arange(1, size + 1, dtype=np.int32)  # padding sees itself
  end_T[:tokens] = tree.subtree_end_T
  plan = layout.build(end_T[None], block)
  starts, keys = plan.query_start[0], plan.key_block[0]
  visited = [
    (query, int(key))
    for query in range(size // block)
    for key in keys[starts[query] : starts[query + 1]]
  ]
  canvas = drawing.canvas(5.4, 5.0)
  ax = canvas.subplots()
  boxes = [(key * block, query * block, block, block) for query, key in visited]
  _fill(ax, boxes, ["#dbe7fb"], edge="white")
  index = np.arange(tokens)
  # The queries that see a key are one interval.
  columns = zip(index, index, tree.subtree_end_T - index, strict=True)
  _fill(
    ax, [(x, y, 1, height) for x, y, height in columns], [drawing.SERIES[0]]
  )
  kinds = [KINDS[token // KIND] for token in tree.tokens_T]
  _fill(ax, [(i, -3, 1, 2) for i in index], kinds)
  _fill(ax, [(-3, i, 2, 1) for i in index], kinds)
  _style_mask(ax, size, block)
  causal = layout.plan_capacity(size, block)
  pairs = int((tree.position_T + 1).sum())
  ax.set_title(
    f"{tokens} tokens: {len(visited)} of {causal} causal blocks visited, "
    f"{pairs} pairs visible",
    **drawing.title(),
  )
  return canvas


def _fill(
  ax: axes.Axes,
  boxes: Sequence[tuple[float, float, float, float]],
  colors: Sequence[str],
  edge: str = "none",
) -> None:
  """Rectangles (x, y, width, height)."""
  shapes = [patches.Rectangle(box[:2], *box[2:]) for box in boxes]
  ax.add_collection(
    collections.PatchCollection(shapes, facecolors=colors, edgecolors=edge)
  )


def _style_mask(ax: axes.Axes, size: int, block: int) -> None:
  ax.set(xlim=(-3.5, size + 0.3), ylim=(size + 0.3, -3.5), aspect="equal")
  triangle = [(0, 0), (size, size), (0, size)]
  ax.add_patch(patches.Polygon(triangle, fill=False, ec=drawing.LINE, zorder=0))
  ticks = np.arange(0, size + 1, 2 * block)
  ax.set_xticks(ticks)
  ax.set_yticks(ticks)
  ax.tick_params(length=0, labelsize=8, labelcolor=drawing.MUTED)
  ax.spines[:].set_visible(False)
  ax.set_xlabel("key", color=drawing.MUTED, fontsize=9)
  ax.set_ylabel("query", color=drawing.MUTED, fontsize=9)


def _history(
  rng: np.random.Generator, turns: int, kind: str
) -> list[np.ndarray]:
  """The requests of one rollout, behind a prompt that all share."""

  def new(size):
    return rng.integers(0, 1 << 30, size)

  prompt = np.arange(1024)
  kept, requests = [], []
  for turn in range(turns):
    if kind == "compaction" and turn and turn % 8 == 0:
      kept = [new(256)]  # a summary of all turns so far
    header = [new(16)] if kind == "header" else []
    reasoning, action, observation = new(96), new(64), new(64)
    requests.append(np.concatenate([*header, prompt, *kept, reasoning, action]))
    says = [action] if kind == "strip" else [reasoning, action]
    kept = [*kept, *says, observation]
  return requests


def trajectories(requests: Sequence[np.ndarray]) -> list[np.ndarray]:
  """The longest of each run of requests that extend one another."""
  result = []
  for request in requests:
    if result and merge.common_prefix(result[-1], request) == len(result[-1]):
      result[-1] = request
    else:
      result.append(request)
  return result


WORKLOADS: Mapping[str, str] = {
  "append": "history only grows",
  "compaction": "a summary every 8 turns",
  "strip": "reasoning left out of the history",
  "header": "a header that changes every time",
}


def savings(kind: str, turns: int) -> tuple[float, float]:
  """Tokens of requests, and of trajectories, for each token of the tree."""
  rng = np.random.default_rng(0)
  rollouts = [_history(rng, turns, kind) for _ in range(8)]
  requests = [request for rollout in rollouts for request in rollout]
  unique = len(merge.merge(requests).tokens_T)
  whole = [one for rollout in rollouts for one in trajectories(rollout)]
  return (
    sum(map(len, requests)) / unique,
    sum(map(len, whole)) / unique,
  )


def turns_picture() -> figure.Figure:
  """The saving by number of turns, against both ways to do without a tree."""
  turns = (1, 2, 4, 6, 8, 9, 12, 16, 17, 20, 24)
  canvas = drawing.canvas(7.4, 3.4)
  sides = canvas.subplots(1, 2)
  for (kind, label), color in zip(
    WORKLOADS.items(), drawing.SERIES, strict=True
  ):
    points = [savings(kind, count) for count in turns]
    for ax, values in zip(sides, zip(*points, strict=True), strict=True):
      ax.plot(turns, values, color=color, marker="o", ms=3, label=label)
  titles = "one request at a time", "one trajectory at a time"
  for ax, title in zip(sides, titles, strict=True):
    ax.set_title(title, **drawing.title())
    ax.set(ylim=(0, None), xticks=(1, 4, 8, 12, 16, 20, 24))
    ax.axhline(1, color=drawing.MUTED, linewidth=0.8, linestyle=":")
    drawing.plain(ax, "turns of an episode")
  sides[0].set_ylabel(
    "tokens for one of the tree", color=drawing.MUTED, fontsize=9
  )
  handles, labels = sides[0].get_legend_handles_labels()
  canvas.legend(
    handles,
    labels,
    loc="outside lower center",
    ncols=2,
    frameon=False,
    fontsize=8.5,
    labelcolor=drawing.INK,
  )
  return canvas


PICTURES: Mapping[str, Callable[[], figure.Figure]] = {
  "prefix_tree_merge": merge_picture,
  "prefix_tree_mask": mask_picture,
  "prefix_tree_turns": turns_picture,
}


if __name__ == "__main__":
  drawing.run(PICTURES)
