"""The pictures of the documents: drawn, and of what they say."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from experiments.figures import drawing, prefix_tree, windowed_fifo

PICTURES = prefix_tree.PICTURES | windowed_fifo.PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_alike_every_time(name):
  draw = PICTURES[name]
  text = drawing.svg(name, draw())
  assert text == drawing.svg(name, draw())
  assert ElementTree.fromstring(text).tag.endswith("svg")
  assert "DejaVu" not in text


def test_the_rows_and_the_tree_are_counted():
  text = drawing.svg("merge", prefix_tree.merge_picture())
  # Prompts of 9, responses, observations of 3 and a summary of 4: requests of
  # 12, 18, 24, 12, 18 and 16. Merged: 9, then 15, 9 and 7.
  assert "6 requests, 100 tokens" in text
  assert "merged: 40 tokens" in text


def test_the_mask_counts_blocks_and_pairs():
  text = drawing.svg("mask", prefix_tree.mask_picture())
  # A prompt of 21 tokens, then four branches of 23; each sees its own past.
  pairs = 21 * 22 // 2 + 4 * sum(range(22, 45))
  assert f"113 tokens: 75 of 120 causal blocks visited, {pairs} pairs" in text


def test_trajectories_are_what_extends():
  a, b, c = (np.arange(n) for n in (2, 4, 6))
  found = prefix_tree.trajectories([a, b, np.array([0, 5, 6]), c])
  assert [one.tolist() for one in found] == [
    [*range(4)],
    [0, 5, 6],
    [*range(6)],
  ]


def test_savings_are_those_of_a_count_by_hand():
  # Eight rollouts of two turns: 1024 shared, 160 tokens each, 64 observed.
  requests = 8 * (1184 + 1408)
  assert prefix_tree.savings("append", 2) == pytest.approx(
    (requests / (1024 + 8 * 384), 8 * 1408 / (1024 + 8 * 384))
  )
  assert prefix_tree.savings("header", 5) == (1.0, 1.0)
  by_request, by_trajectory = prefix_tree.savings("strip", 5)
  assert by_request == by_trajectory > 4


def test_the_window_is_drawn_as_the_scheduler_moves_it():
  frames = windowed_fifo.rule_frames()
  assert [frame.head for frame in frames] == [0, 0, 4, 7]
  worst = frames[-1]
  assert [i for i, s in enumerate(worst.status) if s == worst.status[0]] == [
    i for i in range(11) if i != 7
  ]
  assert worst.status[11:15] == (windowed_fifo.BLOCKED,) * 4


def test_the_lags_drawn_are_all_the_lags():
  lag = {"fifo": np.array([0, 5, 9]), "greedy": np.array([0, 30])}
  values = {name: np.linspace(0, 1, 4) for name in lag}
  picture = windowed_fifo.simulated(values, lag, step=10)
  stairs = picture.axes[1].patches
  assert [sum(one.get_data().values) for one in stairs] == [1, 1]


def test_an_adaptive_window_is_drawn_beside_what_it_watches():
  width, distance = np.linspace(1, 0.1, 5), np.linspace(0, 0.2, 3)
  picture = windowed_fifo.adapted(width, distance)
  drawn = [ax.lines[0].get_ydata().tolist() for ax in picture.axes]
  assert drawn == [width.tolist(), distance.tolist()]
