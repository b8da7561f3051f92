import dataclasses
from html.parser import HTMLParser
import re

import pytest

from forge_jax.observe import names, report

_VOID = {"meta", "br"}


class Page(HTMLParser):
  """Checks that tags nest; keeps the tags, the text and the attributes."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.words = [], [], [], []
    self.feed(text)
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.words.append(data)

  @property
  def text(self):
    return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def record():
  opening = [{"role": "user", "content": "What is 14 * 52?"}]
  call = {"function": {"name": "calc", "arguments": '{"a": 14}'}}
  return report.RunRecord(
    name="demo",
    question="Does it learn?",
    summary={
      "heldout_before": 0.36,
      "heldout_after": 0.985,
      "phrasings_before": 0.52,
      "phrasings_after": 1.0,
      "seconds": 552.3,
      "peak_rss_gb": 6.314,
      "steps": 2,
      "seed": 7,
      "versions": {"jax": "1.2.3"},
      names.YIELD_EFFICIENCY: 1.9946,
      names.YIELD_J: 347.6,
    },
    metrics=[
      {"step": 0, "time": 0.0, names.EVAL_HELDOUT: 0.36},
      {
        "step": 1,
        "time": 1.0,
        names.TRAIN_SUCCESS: 0.05,
        names.TRAIN_REWARD: 0.1,
        names.TRAIN_GRAD_NORM: None,
        names.RATIO_CLIPPED: 0.01,
        names.TREE_MERGE_RATIO: 5.9,
        names.TREE_POSSIBLE_RATIO: 6.2,
        names.TREE_ACHIEVED: 0.93,
        names.MISMATCH_MAX: 1e-4,
        names.THROUGHPUT_ROLLOUT: 400.0,
      },
      {"step": 2, "time": 2.0, names.TRAIN_SUCCESS: 0.5},
    ],
    evaluations=[
      {"step": 2, "heldout": 0.985, "phrasings": 1.0},
      {"step": 0, "heldout": 0.36, "phrasings": None},
    ],
    examples=[
      {
        "question": "What is 14 * 52?",
        "before": [*opening, {"role": "assistant", "content": "66"}],
        "after": [
          *opening,
          {"role": "assistant", "content": None, "tool_calls": [call]},
          {"role": "tool", "content": [{"type": "text", "text": "728"}]},
        ],
        "reward_before": -0.1,
        "reward_after": {"answer": 1.0, "call": 0.3},
      }
    ],
    config={"trainer": {"learning_rate": 2e-5}},
  )


def page_of(tmp_path, record):
  return Page(report.write_report(tmp_path, record).read_text("utf-8"))


def test_the_page_holds_what_was_asked(tmp_path, record):
  page = page_of(tmp_path, record)
  for part in (
    "Does it learn?",
    "36.0% → 98.5% in 2 steps, 9 min 12 s",
    "+62.5 points",
    "+48.0 points",
    'calc({"a": 14})',
    "728",
    "Reward -0.10",
    "Reward +1.30 (answer +1.00, call +0.30)",
    "6.31 GB",
    "1.2.3",
    "1.99 held-out success per 1,000 samples",
    "348 (tokens/s x sample efficiency)",
    '"learning_rate": 2e-05',
  ):
    assert part in page.text, part
  # Of the eight charts, the gradient norm has no finite value.
  assert page.tags.count("svg") == 7
  assert "possible" in page.text and "achieved" in page.text
  assert "Gradient norm" not in page.text
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_page_needs_nothing_beside_itself(tmp_path, record):
  page = page_of(tmp_path, record)
  assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
  for name, value in page.attributes:
    if name in ("src", "href", "xlink:href"):
      assert value.startswith("#"), (name, value)
  text = (tmp_path / "report.html").read_text("utf-8")
  assert "http://" not in text and "https://" not in text
  assert "@import" not in text
  assert "prefers-color-scheme:dark" in text
  assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in (
    page.attributes
  )


def test_everything_is_escaped(tmp_path, record):
  evil = '<script>alert("&")</script>'

  def poison(value):
    if isinstance(value, str):
      return evil
    if isinstance(value, dict):
      return {
        (k if k in _KEYS or "/" in k else evil): poison(v)
        for k, v in value.items()
      }
    return [poison(v) for v in value] if isinstance(value, list) else value

  _KEYS = {
    *record.summary,
    *record.examples[0],
    *("role", "content", "tool_calls", "function", "name", "arguments"),
    *("type", "text", "step", "heldout", "phrasings", "time"),
  }
  poisoned = report.RunRecord(
    **{
      f.name: poison(getattr(record, f.name))
      for f in dataclasses.fields(record)
    }
  )
  page = page_of(tmp_path, poisoned)
  assert "script" not in page.tags
  # Name (title and heading), question, example, five messages (one of which
  # holds a call of two parts), two reward parts merged to one, a version.
  assert page.text.count(evil) >= 11


def test_a_run_cut_short_still_has_a_page(tmp_path):
  empty = report.RunRecord("demo", "Why?", {}, [], [], [], {})
  page = page_of(tmp_path, empty)
  assert "– → –" in page.text
  assert "svg" not in page.tags


def test_the_curve_is_a_picture_of_its_own(tmp_path, record):
  path = tmp_path / "docs" / "curve.svg"
  report.write_curve(path, record)
  text = path.read_text("utf-8")
  assert text.startswith("<svg") and "prefers-color-scheme:dark" in text
  for label in ("held-out", "unseen phrasings", "sampled in training"):
    assert f">{label}<" in text
  # Two held-out points, one of phrasings, two sampled, three in the legend.
  assert text.count("<use") == 8


def test_the_curve_needs_a_success(tmp_path):
  empty = report.RunRecord("demo", "Why?", {}, [], [], [], {})
  with pytest.raises(ValueError, match="'demo' has no success"):
    report.write_curve(tmp_path / "curve.svg", empty)
  assert not list(tmp_path.iterdir())


def test_several_domains_are_drawn_four_at_a_time(tmp_path, record):
  def pages(count):
    success = {f"{names.DOMAIN_SUCCESS}/<{i}>": 0.1 * i for i in range(count)}
    row = {"step": 1, "time": 1.0, names.WATCH_ALARMS: 2.0} | success
    changed = dataclasses.replace(record, metrics=[row])
    path = report.write_report(tmp_path / str(count), changed)
    return path.read_text("utf-8")

  assert [pages(n).count("Success sampled in training") for n in (1, 4, 5)] == [
    0,
    1,
    2,
  ]
  assert "Alarms that hold" in pages(1)
  assert "training: &lt;4&gt;" in pages(5) and "<4>" not in pages(5)
